"""The consistency model of an action: boundary scalings, losses and few-step sampling."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch as th

from sb3_consistency.generative.model import Denoiser, GenerativeModel, clamp_action
from sb3_consistency.generative.networks import ConditionalNetwork, make_network
from sb3_consistency.generative.schedules import (
    check_noise_levels,
    consistency_curriculum,
    doubling_curriculum,
    karras_level,
    karras_sigma,
    sampling_sigmas,
    truncated_log_normal,
)

Sigma = TypeVar("Sigma", th.Tensor, float)
BC_LOSSES = ("ict", "consistency", "reconstruction")
METRICS = ("l2", "pseudo_huber")


def boundary_scalings(sigma: Sigma, sigma_min: float = 0.002, sigma_data: float = 0.5) -> tuple[Sigma, Sigma, Sigma]:
    """
    Coefficients of f(x, sigma) = c_skip x + c_out F(c_in x, sigma) that force f(x, sigma_min) = x.

    Source: Song et al. 2023, appendix C.

    :param sigma: noise level, (B,) or a number, in [sigma_min, sigma_max], in units of the data (actions in [-1, 1])
    :param sigma_min: lowest noise level
    :param sigma_data: standard deviation of the data
    :return: c_skip, c_out, c_in, each of the type of ``sigma``
    :raises ValueError: if ``sigma`` is a tensor that is not one-dimensional
    """
    if isinstance(sigma, th.Tensor) and sigma.ndim != 1:
        raise ValueError(f"sigma must be one-dimensional, got shape {tuple(sigma.shape)}.")
    above = sigma - sigma_min
    scale = (sigma**2 + sigma_data**2) ** 0.5
    return sigma_data**2 / (above**2 + sigma_data**2), sigma_data * above / scale, 1 / scale


def squared_error(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Squared error, mean over the event dimensions.

    A mean and not a sum, so that its balance with a Q term does not depend on the size of the action.

    :param prediction: (B, *E)
    :param target: (B, *E)
    :return: (B,)
    """
    return (prediction - target).square().flatten(1).mean(dim=1)


def pseudo_huber(prediction: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Pseudo-Huber distance sqrt(|u - v|^2 + c^2) - c with c = 0.00054 sqrt(dim).

    Source: Song & Dhariwal 2023 (iCT), section 3.3 (on the norm; the released Consistency-AC applies it per element).

    :param prediction: (B, *E)
    :param target: (B, *E)
    :return: (B,)
    """
    difference = (prediction - target).flatten(1)
    c = 0.00054 * math.sqrt(difference.shape[1])
    return th.sqrt(difference.square().sum(dim=1) + c**2) - c


class ConsistencyModel(GenerativeModel):
    """
    f(x, sigma | s): maps a noisy action at any noise level to the clean action at the start of its ODE trajectory.

    Source: Song et al. 2023; losses from Song & Dhariwal 2023 (``"ict"``), Ding & Jin 2024 (``"consistency"``)
    and Chen et al. 2024, CPQL (``"reconstruction"``, the loss that its released code trains).

    :param action_dim: size A of the action
    :param cond_dim: size F of the condition
    :param network: backbone, "mlp" or "ln_resnet"
    :param network_kwargs: further arguments of the backbone (``net_arch``, ``activation_fn``, ...)
    :param sampling_steps: default number K of network evaluations of :meth:`sample`
    :param bc_loss: "ict" (improved consistency training), "consistency" (Ding & Jin) or "reconstruction" (CPQL)
    :param metric: distance of the two consistency losses, "l2" or "pseudo_huber"; None for the source's own
    :param loss_scaling: weight "consistency" by 100 / (sigma_{n+1} - sigma_n), Ding & Jin's ablation
    :param curriculum: first and last number of noise levels (of "ict": of steps between them); None for (10, 160) with
        "ict" (iCT ends at 1280, for far more samples than a policy sees), (2, 150) with "consistency"
    :param reconstruction_levels: size of the Karras grid that "reconstruction" draws its noise level from
    :param sampling_share: share of the draws of "reconstruction" that fall on the levels at which :meth:`sample` evaluates
        the model in its ``sampling_steps``; 0 is the source's own
    :param p_mean: mean of ln sigma in "ict"
    :param p_std: standard deviation of ln sigma in "ict"
    :param sigma_min: lowest noise level
    :param sigma_max: highest noise level
    :param sigma_data: standard deviation of the data
    :param rho: exponent of the Karras grid
    :raises ValueError: if an option is unknown or out of its range
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        network: str = "mlp",
        network_kwargs: Mapping[str, Any] | None = None,
        sampling_steps: int = 1,
        bc_loss: str = "ict",
        metric: str | None = None,
        loss_scaling: bool = False,
        curriculum: tuple[int, int] | None = None,
        reconstruction_levels: int = 40,
        sampling_share: float = 0.5,
        p_mean: float = -1.1,
        p_std: float = 2.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
    ) -> None:
        super().__init__((action_dim,))
        if bc_loss not in BC_LOSSES:
            raise ValueError(f"bc_loss must be one of {list(BC_LOSSES)}, got {bc_loss!r}.")
        if metric is not None and metric not in METRICS:
            raise ValueError(f"metric must be None or one of {list(METRICS)}, got {metric!r}.")
        check_noise_levels(sigma_min, sigma_max, sigma_data=sigma_data, rho=rho, p_std=p_std)
        self.n_first, self.n_last = curriculum or ((10, 160) if bc_loss == "ict" else (2, 150))
        if not 2 <= self.n_first <= self.n_last:
            raise ValueError(f"curriculum must be (first, last) with 2 <= first <= last, got {curriculum}.")
        self.bc_loss = bc_loss
        self.metric = metric or ("pseudo_huber" if bc_loss == "ict" else "l2")
        self.loss_scaling = loss_scaling
        if reconstruction_levels < 2:
            raise ValueError(f"reconstruction_levels must be at least 2, got {reconstruction_levels}.")
        if not 0 <= sampling_share <= 1:
            raise ValueError(f"sampling_share must be in [0, 1], got {sampling_share}.")
        self.reconstruction_levels = reconstruction_levels
        self.sampling_share = sampling_share
        self.p_mean, self.p_std = p_mean, p_std
        self.sigma_min, self.sigma_max, self.sigma_data, self.rho = sigma_min, sigma_max, sigma_data, rho
        if sampling_steps < 1:
            raise ValueError(f"sampling_steps must be at least 1, got {sampling_steps}.")
        self.sampling_steps = sampling_steps
        self.network: ConditionalNetwork = make_network(network, action_dim, cond_dim, network_kwargs)

    def forward(self, x: th.Tensor, sigma: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy actions, (B, A)
        :param sigma: noise levels, (B,), or (1,) when all rows share one
        :param cond: condition, (B, F)
        :return: f(x, sigma | cond), not clamped, (B, A)
        """
        c_skip, c_out, c_in = (c.unsqueeze(-1) for c in boundary_scalings(sigma, self.sigma_min, self.sigma_data))
        return c_skip * x + c_out * self.network(c_in * x, sigma.log(), cond)  # type: ignore[no-any-return]

    def loss(
        self,
        x0: th.Tensor,
        cond: th.Tensor,
        *,
        noise: th.Tensor,
        u: th.Tensor,
        target: Denoiser | None = None,
        progress: th.Tensor | None = None,
    ) -> th.Tensor:
        if self.bc_loss == "reconstruction":
            return self.reconstruction_loss(x0, cond, noise=noise, u=u)
        return self.consistency_loss(x0, cond, noise=noise, u=u, target=target, progress=progress)

    def consistency_loss(
        self,
        x0: th.Tensor,
        cond: th.Tensor,
        *,
        noise: th.Tensor,
        u: th.Tensor,
        target: Denoiser | None = None,
        progress: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Consistency training: f at one noise level regresses on f at the level below, with the same noise.

        lambda d(f(a + sigma_{n+1} z, sigma_{n+1} | s), stopgrad f_target(a + sigma_n z, sigma_n | s)).

        Source: Song et al. 2023, algorithm 3 ("consistency": n uniform, lambda 1); Song & Dhariwal 2023 ("ict":
        n from a discretised log-normal, lambda = 1 / (sigma_{n+1} - sigma_n)).

        See :meth:`GenerativeModel.loss` for the parameters.
        """
        progress = th.ones((), device=x0.device) if progress is None else progress
        grid = (self.sigma_min, self.sigma_max, self.rho)
        if self.bc_loss == "ict":
            n_levels = doubling_curriculum(progress, self.n_first, self.n_last)
            sigma = truncated_log_normal(u[:, 0], self.p_mean, self.p_std, self.sigma_min, self.sigma_max)
            level = karras_level(sigma, n_levels, *grid).floor()
        else:
            n_levels = consistency_curriculum(progress, self.n_first, self.n_last)
            level = (u[:, 0] * (n_levels - 1)).floor()
        # rounding may lift u or sigma to the last level, which has none above it
        level = th.minimum(level, n_levels - 2)
        low, high = karras_sigma(level, n_levels, *grid), karras_sigma(level + 1, n_levels, *grid)

        prediction = self(x0 + high.unsqueeze(-1) * noise, high, cond)
        with th.no_grad():
            x_low = x0 + low.unsqueeze(-1) * noise
            regression_target = self(x_low, low, cond) if target is None else target(x_low, low)
        distance = (pseudo_huber if self.metric == "pseudo_huber" else squared_error)(prediction, regression_target)
        if self.bc_loss == "ict":
            return distance / (high - low)
        return 100 * distance / (high - low) if self.loss_scaling else distance

    def reconstruction_loss(self, x0: th.Tensor, cond: th.Tensor, *, noise: th.Tensor, u: th.Tensor) -> th.Tensor:
        """
        Weighted denoising error (sigma^-2 + sigma_data^-2) |f(a + sigma z, sigma | s) - a|^2 / A.

        sigma is one of the sampler's levels (``sampling_share``), or uniform over the grid's above sigma_min. Its minimiser
        is the conditional mean of the data given the noisy action: at sigma_max several modes become one, so multi-modality
        is left to a Q term.

        Source: Chen et al. 2024 (CPQL), the loss that the released code trains.

        See :meth:`GenerativeModel.loss` for the parameters.
        """
        sigma = self._reconstruction_sigma(u[:, 0])
        prediction = self(x0 + sigma.unsqueeze(-1) * noise, sigma, cond)
        return (sigma**-2 + self.sigma_data**-2) * squared_error(prediction, x0)

    def _reconstruction_sigma(self, u: th.Tensor) -> th.Tensor:
        n, share = self.reconstruction_levels, self.sampling_share
        grid = (self.sigma_min, self.sigma_max, self.rho)
        # u below the share picks one of the sampler's levels, the rest of it one of the grid's above sigma_min
        level = 1 + ((u - share) / max(1 - share, 1e-6) * (n - 1)).floor().clamp(0, n - 2)
        # the sampler's levels are a Karras grid, too
        step = 1 + (u / max(share, 1e-6) * self.sampling_steps).floor().clamp(max=self.sampling_steps - 1)
        return th.where(u < share, karras_sigma(step, self.sampling_steps + 1, *grid), karras_sigma(level, n, *grid))

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        One jump from pure noise, then for every further step: add noise at a lower level, jump again.

        Source: Song et al. 2023, algorithm 1, with clamping to [-1, 1] after every jump.

        See :meth:`GenerativeModel.sample` for the parameters.
        """
        # len, and not shape[0]: the number of steps stays a number when a policy is traced
        sigmas = sampling_sigmas(len(noise), self.sigma_min, self.sigma_max, self.rho)
        network = self.network.at_levels(tuple(map(math.log, sigmas)), cond)
        # the point before a jump is scale x: numbers are multiplied where tensors need not be
        x, scale = noise[0], self.sigma_max
        for i, sigma in enumerate(sigmas):
            if i > 0:
                x, scale = th.add(x, noise[i], alpha=math.sqrt(sigma**2 - self.sigma_min**2)), 1.0
            c_skip, c_out, c_in = boundary_scalings(sigma, self.sigma_min, self.sigma_data)
            x = clamp_action(th.add((c_skip * scale) * x, network(x, i, c_in * scale), alpha=c_out))
        return x

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return (n_steps or self.sampling_steps, batch_size, *self.event_shape)
