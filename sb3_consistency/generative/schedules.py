"""Noise levels and curricula. Levels ascend: level 0 is sigma_min, level n - 1 is sigma_max."""

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import accumulate, pairwise
from operator import mul
from typing import ParamSpec, TypeVar

import torch as th

P = ParamSpec("P")
R = TypeVar("R")


def check_noise_levels(sigma_min: float, sigma_max: float, **positive: float) -> None:
    """
    :param sigma_min: lowest noise level
    :param sigma_max: highest noise level
    :param positive: what else must be positive: ``sigma_data``, ``rho``, ``p_std``
    :raises ValueError: if one is out of its range
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}.")
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}.")


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """
    :param function: function of hashable arguments
    :return: the same, keeping its results; a compiler sees the function itself, as it looks through caches and complains
    """
    kept = lru_cache(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if th.compiler.is_compiling() else kept(*args, **kwargs)  # type: ignore[arg-type]

    return call


def karras_sigma(
    level: th.Tensor, n_levels: th.Tensor | int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> th.Tensor:
    """
    Noise level number ``level`` of the ``n_levels``-point Karras grid.

    A closed form rather than a table, so that the number of levels may be a tensor that changes during training.

    Source: Karras et al. 2022 (EDM), equation 5, in ascending order (Song et al. 2023, section 2).

    :param level: level numbers, any shape, in [0, n_levels - 1]
    :param n_levels: number of levels, at least 2
    :param sigma_min: lowest noise level, in units of the data (actions scaled to [-1, 1])
    :param sigma_max: highest noise level
    :param rho: how strongly the levels gather near ``sigma_min``
    :return: sigma, the shape of ``level``
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    root: th.Tensor = low + level / (n_levels - 1) * (high - low)
    sigma: th.Tensor = root**rho
    return sigma


def karras_level(
    sigma: th.Tensor, n_levels: th.Tensor | int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> th.Tensor:
    """
    Inverse of :func:`karras_sigma`: the (fractional) level number of a noise level.

    :param sigma: noise levels, any shape, in [sigma_min, sigma_max]
    :param n_levels: number of levels, at least 2
    :return: level numbers in [0, n_levels - 1], the shape of ``sigma``
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    level: th.Tensor = (sigma ** (1 / rho) - low) / (high - low) * (n_levels - 1)
    return level


def truncated_log_normal(u: th.Tensor, mean: float, std: float, sigma_min: float, sigma_max: float) -> th.Tensor:
    """
    Noise levels whose logarithm is normal, conditioned on [sigma_min, sigma_max], by inversion of the distribution.

    Rounding the result down to a grid draws level n with probability
    proportional to erf((ln sigma_{n+1} - mean) / (sqrt 2 std)) - erf((ln sigma_n - mean) / (sqrt 2 std)),
    the discretised log-normal of Song & Dhariwal 2023 (iCT), section 3.5.

    :param u: uniform numbers in [0, 1), any shape
    :param mean: mean of ln sigma (P_mean)
    :param std: standard deviation of ln sigma (P_std)
    :return: sigma, the shape of ``u``
    """

    def cdf(sigma: float) -> float:
        return 0.5 * (1 + math.erf((math.log(sigma) - mean) / (math.sqrt(2) * std)))

    low, high = cdf(sigma_min), cdf(sigma_max)
    sigma = th.exp(mean + std * th.special.ndtri(low + u * (high - low)))
    return sigma.clamp(sigma_min, sigma_max)


@cached
def sampling_sigmas(n_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> tuple[float, ...]:
    """
    The noise levels at which an ``n_steps``-step consistency sampler evaluates the model, highest first.

    They are the Karras levels of ``n_steps + 1`` points without sigma_min, where the model is the identity
    and a pass would be wasted: {80} for one step, {80, 2.52} for two.

    :param n_steps: number of network evaluations, at least 1
    :return: ``n_steps`` descending noise levels, the first is ``sigma_max``
    :raises ValueError: if ``n_steps`` is less than 1
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (sigma_max, *((low + i / n_steps * (high - low)) ** rho for i in range(n_steps - 1, 0, -1)))


def consistency_curriculum(progress: th.Tensor, n_first: int, n_last: int) -> th.Tensor:
    """
    Number of noise levels N(k) of consistency training, from ``n_first`` to ``n_last`` over the whole run.

    Source: Song et al. 2023, appendix C, in Ding & Jin's form: ceil(sqrt(k/K (s1^2 - s0^2) + s0^2) - 1) + 1.

    :param progress: share k/K of the run that is done, scalar in [0, 1]
    :return: number of levels, scalar
    """
    return th.ceil(th.sqrt(progress * (n_last**2 - n_first**2) + n_first**2) - 1) + 1


def doubling_curriculum(progress: th.Tensor, n_first: int, n_last: int) -> th.Tensor:
    """
    Number of noise levels of improved consistency training: doubles at equal intervals until ``n_last``.

    Source: Song & Dhariwal 2023 (iCT), section 3.4: min(s0 2^floor(k/K'), s1) + 1, K' = K / (log2(s1/s0) + 1).

    :param progress: share k/K of the run that is done, scalar in [0, 1]
    :return: number of levels, scalar
    """
    doublings = th.floor(progress * (math.log2(n_last / n_first) + 1))
    return th.clamp(n_first * 2**doublings, max=n_last) + 1


def vp_alpha_bars(n_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> tuple[float, ...]:
    """
    Signal power left after t = 1..T steps of the variance-preserving schedule.

    alpha_t = exp(-b_min / T - (b_max - b_min) (2 t - 1) / (2 T^2)), whose product telescopes.

    Source: Wang et al. 2022 (Diffusion-QL), appendix; Xiao et al. 2021.

    :param n_steps: number of steps T
    :param beta_min: noise rate at the start
    :param beta_max: noise rate at the end
    :return: abar_1, ..., abar_T, descending
    """
    shares = [t / n_steps for t in range(1, n_steps + 1)]
    return tuple(math.exp(-beta_min * s - 0.5 * (beta_max - beta_min) * s**2) for s in shares)


def cosine_alpha_bars(n_steps: int, offset: float = 0.008, beta_limit: float = 0.999) -> tuple[float, ...]:
    """
    Signal power left after t = 1..T steps of the cosine schedule.

    Source: Nichol & Dhariwal 2021, equation 17, with beta_t = 1 - abar_t / abar_{t-1} at most ``beta_limit``.

    :param n_steps: number of steps T
    :param offset: the paper's s, which keeps the first steps from adding too little noise
    :param beta_limit: largest beta_t
    :return: abar_1, ..., abar_T, descending
    """
    curve = [math.cos((t / n_steps + offset) / (1 + offset) * math.pi / 2) ** 2 for t in range(n_steps + 1)]
    alphas = (max(after / before, 1 - beta_limit) for before, after in pairwise(curve))
    return tuple(accumulate(alphas, mul))


BETA_SCHEDULES = {"vp": vp_alpha_bars, "cosine": cosine_alpha_bars}


@cached
def diffusion_steps_taken(n_steps: int, n_taken: int) -> tuple[int, ...]:
    """
    The steps at which a sampler evaluates a diffusion model, highest first: evenly spaced, step T among them.

    :param n_steps: number of steps T that the model was trained on
    :param n_taken: number of network evaluations, in 1..T
    :return: ``n_taken`` descending step numbers, the first is T
    :raises ValueError: if ``n_taken`` is out of its range
    """
    if not 1 <= n_taken <= n_steps:
        raise ValueError(f"sampling_steps must be in [1, diffusion_steps = {n_steps}], got {n_taken}.")
    return tuple(round(n_steps * i / n_taken) for i in range(n_taken, 0, -1))
