"""The EDM denoiser of a window of trajectory, its loss, and Heun's sampler: the teacher of a consistency planner."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch as th

from sb3_consistency.generative.consistency import Sigma, boundary_scalings, pseudo_huber, squared_error
from sb3_consistency.generative.model import Denoiser, GenerativeModel, clamp_action
from sb3_consistency.generative.schedules import check_noise_levels, karras_sigma, sampling_sigmas
from sb3_consistency.generative.temporal import make_temporal_network
from sb3_consistency.options import option

WINDOW_METRICS = ("l2", "pseudo_huber", "pseudo_huber_squared", "pseudo_huber_norm")


def window_distance(prediction: th.Tensor, target: th.Tensor, metric: str = "l2") -> th.Tensor:
    """
    Distance of windows.

    "l2" is the mean of e^2 over the elements; "pseudo_huber" that of sqrt(e^2 + c^2) - c with c = 0.00054 sqrt(H D)
    (RACTD, equation 6); "pseudo_huber_squared" puts e^4 in the place of e^2, as the released code does;
    "pseudo_huber_norm" applies the function to the norm of the whole window, as iCT does.

    :param prediction: (B, H, D)
    :param target: (B, H, D)
    :param metric: one of :data:`WINDOW_METRICS`
    :return: (B,)
    """
    if metric == "l2":
        return squared_error(prediction, target)
    if metric == "pseudo_huber_norm":
        return pseudo_huber(prediction, target)
    square = (prediction - target).flatten(1).square()
    c = 0.00054 * math.sqrt(square.shape[1])
    if metric == "pseudo_huber_squared":
        square = square.square()
    return (th.sqrt(square + c**2) - c).mean(dim=1)


def heun_step(denoiser: Callable[[th.Tensor, Sigma], th.Tensor], x: th.Tensor, t: Sigma, u: Sigma) -> th.Tensor:
    """
    One step of Heun's method on the probability-flow ODE dx/dt = (x - D(x, t)) / t, from noise level t to u < t.

    Source: Karras et al. 2022 (EDM), algorithm 1 with sigma(t) = t and s(t) = 1.

    :param denoiser: D
    :param x: noisy windows at t, (B, H, D)
    :param t: noise levels, (B,), or one number
    :param u: lower noise levels, positive, of the type of ``t``
    :return: windows at u, (B, H, D)
    """
    t_, u_ = (level.view(-1, 1, 1) if isinstance(level, th.Tensor) else level for level in (t, u))
    slope = (x - denoiser(x, t)) / t_
    euler = x + (u_ - t_) * slope
    return x + (u_ - t_) * 0.5 * (slope + (euler - denoiser(euler, u)) / u_)


class KarrasModel(GenerativeModel):
    """
    What teacher and student share: the noise levels, the weights of the losses, and a scaled network.

    :raises ValueError: if an option is unknown or out of its range
    """

    #: number of noise levels that the network is told
    n_inputs: ClassVar[int] = 1

    event_shape: tuple[int, int] = option(kw_only=False, fixed=True, doc="shape (H, D) of the window")
    cond_dim: int = option(kw_only=False, fixed=True, doc="size F of the condition")
    network_name: str = option(
        default="unet", alias="network", attribute="network_name", fixed=True, doc='backbone, "unet" or "mlp"'
    )
    network_kwargs: Mapping[str, Any] | None = option(
        default=None, fixed=True, doc="further arguments of the backbone (``net_arch``, ``activation_fn``, ...)"
    )
    metric: str = option(
        default="l2",
        one_of=WINDOW_METRICS,
        doc='distance of the denoising loss, see :func:`window_distance`; only the minimiser of "l2" is a denoiser',
    )
    n_levels: int = option(default=80, low=2, doc="size of the Karras grid")
    p_mean: float = option(default=-1.2, doc="mean of ln sigma in the denoising losses")
    p_std: float = option(default=1.2, doc="standard deviation of ln sigma")
    sigma_min: float = option(default=0.02, doc="lowest noise level, where the model is the identity")
    sigma_max: float = option(default=80.0, doc="highest noise level")
    sigma_data: float = option(default=0.5, doc="standard deviation of the data")
    rho: float = option(default=7.0, doc="exponent of the Karras grid")
    initial_noise_scale: float | None = option(
        default=None,
        above=0,
        doc="standard deviation of what samplers start from; None for ``sigma_max``, as the maths wants; the released code "
        "starts from 1, which is almost deterministic",
    )

    def check_together(self) -> None:
        super().check_together()
        check_noise_levels(self.sigma_min, self.sigma_max, sigma_data=self.sigma_data, rho=self.rho, p_std=self.p_std)

    def build(self) -> None:
        kwargs = {"n_levels": self.n_inputs, **(self.network_kwargs or {})}
        self.network = make_temporal_network(self.network_name, self.event_shape, self.cond_dim, **kwargs)

    def extra_repr(self) -> str:
        return f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}, sigma_data={self.sigma_data}"

    def scaled_network(self, x: th.Tensor, cond: th.Tensor, sigma: th.Tensor, *more_sigmas: th.Tensor) -> th.Tensor:
        """
        c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, cond, ln sigma, ...) with the boundary scalings.

        :param x: noisy windows, (B, H, D)
        :param cond: condition, (B, F)
        :param sigma: their noise levels, (B,), or (1,) when all rows share one
        :param more_sigmas: further noise levels that the network is told, of the shape of ``sigma``
        :return: (B, H, D); x itself at sigma_min
        """
        scalings = boundary_scalings(sigma, self.sigma_min, self.sigma_data)
        c_skip, c_out, c_in = (c.view(-1, 1, 1) for c in scalings)
        levels = (s.log() for s in (sigma, *more_sigmas))
        return c_skip * x + c_out * self.network(c_in * x, cond, *levels)  # type: ignore[no-any-return]

    def at_levels(self, levels: Sequence[tuple[float, ...]], cond: th.Tensor) -> Callable[..., th.Tensor]:
        """
        Fix noise levels and condition: what depends on them alone is computed once.

        :param levels: the noise levels of every evaluation, as :meth:`scaled_network` takes them
        :param cond: condition, (B, F)
        :return: function of (x (B, H, D), *levels of one of the evaluations), equal to :meth:`scaled_network`
        """
        network = self.network.at_levels([tuple(map(math.log, level)) for level in levels], cond)
        number = {level: i for i, level in enumerate(levels)}

        def evaluate(x: th.Tensor, *level: float) -> th.Tensor:
            c_skip, c_out, c_in = boundary_scalings(level[0], self.sigma_min, self.sigma_data)
            return th.add(c_skip * x, network(c_in * x, number[level]), alpha=c_out)

        return evaluate

    def sigma_at(self, level: th.Tensor) -> th.Tensor:
        """
        :param level: (fractional) numbers of levels, ascending from sigma_min
        :return: noise levels, the shape of ``level``
        """
        return karras_sigma(level, self.n_levels, self.sigma_min, self.sigma_max, self.rho)

    def log_normal_sigma(self, u: th.Tensor) -> th.Tensor:
        """
        :param u: uniform numbers in [0, 1), any shape
        :return: noise levels with ln sigma ~ N(p_mean, p_std^2), clamped to the grid, where the weight is finite
        """
        return th.exp(self.p_mean + self.p_std * th.special.ndtri(u)).clamp(self.sigma_min, self.sigma_max)

    @abstractmethod
    def sample_ode(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        As :meth:`sample`, but a function of the first noise alone: along the probability-flow ODE, no fresh noise between.

        :param noise: standard normal noise, (S, B, H, D); only its first entry is used
        :param cond: condition, (B, F)
        :return: windows, (B, H, D), in [-1, 1]
        """

    def weight(self, sigma: th.Tensor) -> th.Tensor:
        """
        :param sigma: noise levels
        :return: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM, table 1)
        """
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class EDMModel(KarrasModel):
    """
    Denoiser D(x, sigma | s) of windows, sampled by Heun's method on its probability-flow ODE.

    Source: Karras et al. 2022, with the boundary scalings of consistency models in place of EDM's, as in RACTD.
    """

    def forward(self, x: th.Tensor, sigma: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy windows, (B, H, D)
        :param sigma: noise levels, (B,), or (1,) when all rows share one
        :param cond: condition, (B, F)
        :return: D(x, sigma | cond), not clamped, (B, H, D)
        """
        return self.scaled_network(x, cond, sigma)

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
        """
        Weighted denoising error at a log-normal noise level; ``target`` and ``progress`` are not used.

        Source: Karras et al. 2022, equation 2 with table 1's weight and noise distribution.

        See :meth:`GenerativeModel.loss` for the parameters.
        """
        return self.denoising_loss(x0, cond, noise=noise, u=u)[0]

    def denoising_loss(self, x0: th.Tensor, cond: th.Tensor, *, noise: th.Tensor, u: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param x0: windows, (B, H, D)
        :param cond: condition, (B, F)
        :param noise: standard normal noise, (B, H, D)
        :param u: uniform numbers in [0, 1), of which the first column is used, (B, 1)
        :return: loss, (B,), and the predicted windows, (B, H, D)
        """
        sigma = self.log_normal_sigma(u[:, 0])
        prediction = self(x0 + sigma.view(-1, 1, 1) * noise, sigma, cond)
        return self.weight(sigma) * window_distance(prediction, x0, self.metric), prediction

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        Heun's method from the highest level to the lowest, two network evaluations per step; deterministic given its start.

        :param noise: standard normal noise, (S, B, H, D), for S steps; only its first entry is used
        :param cond: condition, (B, F)
        :return: windows, (B, H, D), in [-1, 1]
        """
        n_steps = len(noise)
        sigmas = (*sampling_sigmas(n_steps, self.sigma_min, self.sigma_max, self.rho), self.sigma_min)
        denoiser = self.at_levels([(sigma,) for sigma in sigmas], cond)
        x = (self.initial_noise_scale or self.sigma_max) * noise[0]
        for t, u in pairwise(sigmas):
            x = heun_step(denoiser, x, t, u)
        return clamp_action(x)

    def sample_ode(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        return self.sample(noise, cond)

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return (n_steps or self.n_levels - 1, batch_size, *self.event_shape)
