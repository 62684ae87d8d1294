"""The diffusion model of an action: variance-preserving schedules, the epsilon loss, DDPM and DDIM sampling."""

import math
from itertools import pairwise

import torch as th

from sb3_consistency.generative.consistency import squared_error
from sb3_consistency.generative.model import ActionModel, Denoiser, clamp_action
from sb3_consistency.generative.schedules import BETA_SCHEDULES, diffusion_steps_taken
from sb3_consistency.options import Options, check_range, option

SAMPLERS = ("ddpm", "ddim")


class DiffusionOptions(Options):
    """What a diffusion model can be told, and every algorithm that has one."""

    diffusion_steps: int = option(default=5, low=1, fixed=True, doc="number T of noise levels", search=(2, 10))
    beta_schedule: str = option(
        default="vp",
        one_of=tuple(BETA_SCHEDULES),
        fixed=True,
        doc='"vp" (Wang et al. 2022) or "cosine" (Nichol & Dhariwal 2021)',
        search=list(BETA_SCHEDULES),
    )
    sampling_steps: int | None = option(default=None, low=1, doc="network evaluations per action, at most T; None for T")
    sampler: str = option(
        default="ddpm",
        one_of=SAMPLERS,
        doc='"ddpm" (ancestral sampling: fresh noise in every step) or "ddim" (deterministic given its first noise)',
        search=list(SAMPLERS),
    )

    def check_together(self) -> None:
        super().check_together()
        # the second is an actor-critic's
        for name in ("sampling_steps", "train_sampling_steps"):
            check_range(name, vars(self).get(name), 1, self.diffusion_steps, integer=True, optional=True)


class DiffusionModel(DiffusionOptions, ActionModel):
    """
    Variance-preserving diffusion of an action: the network predicts the noise that was added.

    x_t = sqrt(abar_t) a + sqrt(1 - abar_t) eps, t = 1..T; abar_0 = 1.

    Source: Ho et al. 2020 (DDPM); Song et al. 2021 (DDIM, arXiv 2010.02502); as a policy: Wang et al. 2022.

    :raises ValueError: if an option is unknown or out of its range
    """

    def build(self) -> None:
        super().build()
        # plain numbers for the sampler, whose steps are known; a table for the loss, whose steps are drawn
        self.alpha_bars = (1.0, *BETA_SCHEDULES[self.beta_schedule](self.diffusion_steps))
        self.alpha_bar: th.Tensor
        self.register_buffer("alpha_bar", th.tensor(self.alpha_bars[1:]), persistent=False)

    def forward(self, x: th.Tensor, t: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy actions, (B, A)
        :param t: step numbers in 1..T, (B,), or (1,) when all rows share one
        :param cond: condition, (B, F)
        :return: predicted noise eps, (B, A)
        """
        return self.network(x, (t - 1).to(x.dtype), cond)  # type: ignore[no-any-return]

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
        Squared error of the predicted noise, mean over the dimensions, at a uniformly drawn step.

        Source: Ho et al. 2020, equation 14; Wang et al. 2022, equation 2. ``target`` and ``progress`` are not used.

        See :meth:`GenerativeModel.loss` for the parameters.
        """
        # rounding may lift u to 1
        index = (u[:, 0] * self.diffusion_steps).long().clamp(max=self.diffusion_steps - 1)
        alpha_bar = self.alpha_bar[index].unsqueeze(-1)
        noisy = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        return squared_error(self(noisy, index + 1, cond), noise)

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        From pure noise down S of the T steps, with the predicted clean action clamped to [-1, 1] in each.

        A step from t to s goes to sqrt(abar_s) a + sqrt(1 - abar_s - v) eps + sqrt(v) z, where eps is the noise that
        belongs to the clamped a. With v = (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s) this is the posterior
        q(x_s | x_t, a) of DDPM (Ho et al. 2020, equation 7), with v = 0 it is DDIM (Song et al. 2021, equation 12).

        See :meth:`GenerativeModel.sample` for the parameters.
        """
        x = noise[0]
        # len, and not shape[0]: the number of steps stays a number when a policy is traced
        steps = diffusion_steps_taken(self.diffusion_steps, len(noise))
        network = self.network.at_levels(tuple(float(t - 1) for t in steps), cond)
        for i, (t, s) in enumerate(pairwise((*steps, 0))):
            abar_t, abar_s = self.alpha_bars[t], self.alpha_bars[s]
            eps = network(x, i, 1.0)
            x0 = clamp_action(th.add(x / math.sqrt(abar_t), eps, alpha=-math.sqrt((1 - abar_t) / abar_t)))
            if s == 0:
                return x0
            variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s) if self.sampler == "ddpm" else 0.0
            towards_noise = math.sqrt(1 - abar_s - variance) / math.sqrt(1 - abar_t)
            x = th.add((math.sqrt(abar_s) - towards_noise * math.sqrt(abar_t)) * x0, x, alpha=towards_noise)
            if variance > 0:
                x = th.add(x, noise[i + 1], alpha=math.sqrt(variance))
        raise AssertionError("a sampler takes at least one step")

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return (n_steps or self.sampling_steps or self.diffusion_steps, batch_size, *self.event_shape)
