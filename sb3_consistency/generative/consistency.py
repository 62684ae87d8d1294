"""The consistency model of an action: boundary scalings, losses and few-step sampling."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

from sb3_consistency.generative.model import ActionModel, Denoiser, clamp_action
from sb3_consistency.generative.networks import ConditionalNetwork
from sb3_consistency.generative.schedules import (
    check_noise_levels,
    consistency_curriculum,
    doubling_curriculum,
    karras_level,
    karras_sigma,
    sampling_sigmas,
    truncated_log_normal,
)
from sb3_consistency.generative.temporal import ChunkUnet
from sb3_consistency.options import Options, option

Network = ConditionalNetwork | ChunkUnet
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


def denoising_error(prediction: th.Tensor, x0: th.Tensor, sigma: th.Tensor, sigma_data: float) -> th.Tensor:
    """
    Weighted squared error (sigma^-2 + sigma_data^-2) |prediction - x0|^2 / dim.

    Source: Karras et al. 2022 (EDM), table 1 for the weight.

    :param prediction: of the clean data, (B, *E)
    :param x0: clean data, (B, *E)
    :param sigma: noise levels that it was predicted from, (B,)
    :param sigma_data: standard deviation of the data
    :return: (B,)
    """
    return (sigma**-2 + sigma_data**-2) * squared_error(prediction, x0)


def scaled(
    network: Network, x: th.Tensor, sigma: th.Tensor, cond: th.Tensor, sigma_min: float, sigma_data: float
) -> th.Tensor:
    """
    c_skip x + c_out F(c_in x, ln sigma | s) with the boundary scalings.

    :param network: F
    :param x: noisy actions, (B, A)
    :param sigma: noise levels, (B,), or (1,) when all rows share one
    :param cond: condition, (B, F)
    :param sigma_min: noise level at which it is x
    :param sigma_data: standard deviation of the data
    :return: not clamped, (B, A)
    """
    c_skip, c_out, c_in = (c.unsqueeze(-1) for c in boundary_scalings(sigma, sigma_min, sigma_data))
    return c_skip * x + c_out * network(c_in * x, sigma.log(), cond)  # type: ignore[no-any-return]


def scaled_at_levels(
    network: Network, sigmas: tuple[float, ...], cond: th.Tensor, sigma_min: float, sigma_data: float
) -> Callable[[th.Tensor, int, float], th.Tensor]:
    """
    :func:`scaled` with its noise levels and condition fixed, as a sampler calls it.

    :param network: F
    :param sigmas: noise levels that will be used
    :param cond: condition, (B, F)
    :param sigma_min: noise level at which it is x
    :param sigma_data: standard deviation of the data
    :return: function of (x (B, A), number of the level, scale): clamped to [-1, 1], of scale x at that level
    """
    at_levels = network.at_levels(tuple(map(math.log, sigmas)), cond)

    def evaluate(x: th.Tensor, i: int, scale: float) -> th.Tensor:
        c_skip, c_out, c_in = boundary_scalings(sigmas[i], sigma_min, sigma_data)
        return clamp_action(th.add((c_skip * scale) * x, at_levels(x, i, c_in * scale), alpha=c_out))

    return evaluate


class ConsistencyOptions(Options):
    """What a consistency model can be told, and every algorithm that has one."""

    sampling_steps: int = option(default=1, low=1, doc="network evaluations K per action", search=(1, 3))
    bc_loss: str = option(
        default="ict",
        one_of=BC_LOSSES,
        doc='"ict" (improved consistency training), "consistency" (Ding & Jin) or "reconstruction" (CPQL)',
        search=list(BC_LOSSES),
    )
    metric: str | None = option(
        default=None,
        one_of=METRICS,
        doc='distance of the consistency losses, "l2" or "pseudo_huber"; None for the source\'s own',
    )
    loss_scaling: bool = option(
        default=False, doc='weight "consistency" by 100 / (sigma_{n+1} - sigma_n), Ding & Jin\'s ablation'
    )
    curriculum: tuple[int, int] | None = option(
        default=None,
        low=2,
        doc='first and last number of noise levels (of "ict": of steps between them); None for (10, 160) with "ict" (iCT ends '
        'at 1280, for far more samples than a policy sees), (2, 150) with "consistency"',
    )

    def check_together(self) -> None:
        super().check_together()
        if self.curriculum is not None and self.curriculum[0] > self.curriculum[1]:
            raise ValueError(f"curriculum must be (first, last) with 2 <= first <= last, got {self.curriculum}.")


class ConsistencyActorOptions(ConsistencyOptions):
    """What an algorithm with a consistency actor can be told."""

    consistency_ema_decay: float = option(
        default=0.0,
        low=0,
        high=1,
        fixed=True,
        doc='decay per gradient step of the moving average that supplies the regression targets of "consistency"; 0 regresses '
        "on the current network (no gradient), which learns sooner",
    )


class ConsistencyModel(ConsistencyOptions, ActionModel):
    """
    f(x, sigma | s): maps a noisy action at any noise level to the clean action at the start of its ODE trajectory.

    Source: Song et al. 2023; losses from Song & Dhariwal 2023 (``"ict"``), Ding & Jin 2024 (``"consistency"``)
    and Chen et al. 2024, CPQL (``"reconstruction"``, the loss that its released code trains).

    :raises ValueError: if an option is unknown or out of its range
    """

    reconstruction_levels: int = option(
        default=40, low=2, doc='size of the Karras grid that "reconstruction" draws its noise level from'
    )
    sampling_share: float = option(
        default=0.5,
        low=0,
        high=1,
        doc='share of the draws of "reconstruction" that fall on the levels at which :meth:`sample` evaluates the model in '
        "its ``sampling_steps``; 0 is the source's own",
    )
    p_mean: float = option(default=-1.1, doc='mean of ln sigma in "ict"')
    p_std: float = option(default=2.0, doc='standard deviation of ln sigma in "ict"')
    sigma_min: float = option(default=0.002, doc="lowest noise level")
    sigma_max: float = option(default=80.0, doc="highest noise level")
    sigma_data: float = option(default=0.5, doc="standard deviation of the data")
    rho: float = option(default=7.0, doc="exponent of the Karras grid")

    @classmethod
    def moving_averages(cls, options: Any) -> dict[str, float]:
        decay = options.consistency_ema_decay
        return {"consistency_target": decay} if decay > 0 else {}

    @property
    def regression_target(self) -> str | None:
        return "consistency_target" if self.bc_loss == "consistency" else None

    def check_together(self) -> None:
        super().check_together()
        check_noise_levels(self.sigma_min, self.sigma_max, sigma_data=self.sigma_data, rho=self.rho, p_std=self.p_std)

    def forward(self, x: th.Tensor, sigma: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy actions, (B, A)
        :param sigma: noise levels, (B,), or (1,) when all rows share one
        :param cond: condition, (B, F)
        :return: f(x, sigma | cond), not clamped, (B, A)
        """
        return scaled(self.network, x, sigma, cond, self.sigma_min, self.sigma_data)

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
            n_levels = doubling_curriculum(progress, *(self.curriculum or (10, 160)))
            sigma = truncated_log_normal(u[:, 0], self.p_mean, self.p_std, self.sigma_min, self.sigma_max)
            level = karras_level(sigma, n_levels, *grid).floor()
        else:
            n_levels = consistency_curriculum(progress, *(self.curriculum or (2, 150)))
            level = (u[:, 0] * (n_levels - 1)).floor()
        # rounding may lift u or sigma to the last level, which has none above it
        level = th.minimum(level, n_levels - 2)
        low, high = karras_sigma(level, n_levels, *grid), karras_sigma(level + 1, n_levels, *grid)

        prediction = self(x0 + high.unsqueeze(-1) * noise, high, cond)
        with th.no_grad():
            x_low = x0 + low.unsqueeze(-1) * noise
            regression_target = self(x_low, low, cond) if target is None else target(x_low, low)
        metric = self.metric or ("pseudo_huber" if self.bc_loss == "ict" else "l2")
        distance = (pseudo_huber if metric == "pseudo_huber" else squared_error)(prediction, regression_target)
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
        return denoising_error(prediction, x0, sigma, self.sigma_data)

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
        jump = scaled_at_levels(self.network, sigmas, cond, self.sigma_min, self.sigma_data)
        # the point before a jump is scale x: numbers are multiplied where tensors need not be
        x, scale = noise[0], self.sigma_max
        for i, sigma in enumerate(sigmas):
            if i > 0:
                x, scale = th.add(x, noise[i], alpha=math.sqrt(sigma**2 - self.sigma_min**2)), 1.0
            x = jump(x, i, scale)
        return x

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return (n_steps or self.sampling_steps, batch_size, *self.event_shape)
