"""A denoiser of actions at few noise levels: accurate where they are narrow, several passes where they are many."""

from itertools import pairwise
from typing import ClassVar

import torch as th

from sb3_consistency.generative.consistency import denoising_error, scaled, scaled_at_levels
from sb3_consistency.generative.model import ActionModel, Denoiser
from sb3_consistency.options import option


class DenoisingModel(ActionModel):
    r"""
    D(x, sigma | s): the mean of the clean action, given a noisy one, at the few levels at which the sampler asks for it.

    From one level to the next the sampler follows the probability-flow ODE in one step of Euler's:

    .. math:: x_{i+1} = D(x_i, \sigma_i) + \frac{\sigma_{i+1}}{\sigma_i} (x_i - D(x_i, \sigma_i)), \qquad x_1 = \sigma_1 z

    Source: Karras et al. 2022 (EDM), table 1 for scalings and weight, algorithm 1 without the second-order correction (which
    makes it DDIM, Song et al. 2021); there the levels are learned over a continuum.

    :raises ValueError: if an option is unknown or out of its range
    """

    #: noise levels, descending, in units of the data (actions in [-1, 1]); one pass each
    levels: ClassVar[tuple[float, ...]] = (80.0, 0.7, 0.35, 0.175)
    sigma_data: float = option(default=0.5, above=0, doc="standard deviation of the data")

    def build(self) -> None:
        super().build()
        self.sigmas: th.Tensor
        # saved: it tells the parameters of a denoiser from those of a consistency model, which have the same shapes
        self.register_buffer("sigmas", th.tensor(self.levels))

    def forward(self, x: th.Tensor, sigma: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy actions, (B, A)
        :param sigma: noise levels, (B,), or (1,) when all rows share one
        :param cond: condition, (B, F)
        :return: D(x, sigma | cond), not clamped, (B, A)
        """
        return scaled(self.network, x, sigma, cond, 0.0, self.sigma_data)

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
        Weighted denoising error (sigma^-2 + sigma_data^-2) |D(a + sigma z, sigma | s) - a|^2 / A at one of the levels.

        Source: Karras et al. 2022, equation 2 and table 1. ``target`` and ``progress`` are not used.

        See :meth:`GenerativeModel.loss` for the parameters.
        """
        # rounding may lift u to 1
        sigma = self.sigmas[(u[:, 0] * len(self.levels)).long().clamp(max=len(self.levels) - 1)]
        prediction = self(x0 + sigma.unsqueeze(-1) * noise, sigma, cond)
        return denoising_error(prediction, x0, sigma, self.sigma_data)

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        Down the levels; deterministic given the first noise, the only one that is used.

        See :meth:`GenerativeModel.sample` for the parameters.
        """
        denoise = scaled_at_levels(self.network, self.levels, cond, 0.0, self.sigma_data)
        x, scale = noise[0], self.levels[0]
        for i, (sigma, lower) in enumerate(pairwise((*self.levels, 0.0))):
            clean = denoise(x, i, scale)
            x, scale = clean + (lower / sigma) * (scale * x - clean), 1.0
        return x

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return (1, batch_size, *self.event_shape)
