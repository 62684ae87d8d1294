"""The consistency trajectory model: jumps from any noise level to any lower one, distilled from an EDM teacher."""

import math
from typing import ClassVar

import torch as th
from torch.func import functional_call

from sb3_consistency.generative.edm import WINDOW_METRICS, EDMModel, KarrasModel, heun_step, window_distance
from sb3_consistency.generative.model import Denoiser, clamp_action
from sb3_consistency.generative.schedules import sampling_sigmas
from sb3_consistency.options import Options, option

DSM_TARGETS = ("jump", "denoiser")


class JumpOptions(Options):
    """What a trajectory model can be told, and every planner that has one."""

    sampling_steps: int = option(default=1, low=1, doc="jumps, that is network passes, per plan", search=[1, 2])


class TrajectoryConsistencyModel(JumpOptions, KarrasModel):
    """
    G(x, t, s | c) = (s/t) x + (1 - s/t) g(x, t, s | c): from noise level t to s <= t along the teacher's ODE.

    g has the boundary scalings of the teacher's denoiser D in t; on the diagonal the exact g(x, t, t) is D(x, t).

    Source: Kim et al. 2023 (CTM), equation 4, as used by Duan et al. 2026 (RACTD).

    :raises ValueError: if an option is unknown or out of its range
    """

    n_uniforms: ClassVar[int] = 4
    n_inputs: ClassVar[int] = 2

    ctm_gamma: float = option(
        default=1.0,
        low=0,
        high=1,
        doc="share of fresh noise between two jumps: 1 jumps to the end and adds all of it back (consistency sampling), 0 "
        "adds none (CTM, algorithm 3), as in :meth:`sample_ode`",
    )
    distillation_metric: str = option(
        default="pseudo_huber_norm",
        one_of=WINDOW_METRICS,
        doc="distance of the distillation loss, see :func:`window_distance`; the denoising loss has ``metric``",
    )
    dsm_target: str = option(
        default="denoiser",
        one_of=DSM_TARGETS,
        doc='what the denoising loss trains: "jump", G(x_t, t, sigma_min) (RACTD), or "denoiser", g(x_t, t, t) (CTM)',
    )
    dsm_rho_share: float = option(
        default=0.7,
        low=0,
        high=1,
        doc="half of its noise levels are uniform in [0, this] on the rho scale counted from sigma_max",
    )

    def forward(self, x: th.Tensor, t: th.Tensor, s: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy windows at t, (B, H, D)
        :param t: noise levels, (B,), or (1,) when all rows share one
        :param s: lower noise levels to jump to, of the shape of ``t``
        :param cond: condition, (B, F)
        :return: G(x, t, s | cond), not clamped, (B, H, D); x itself for s = t
        """
        share = (s / t).view(-1, 1, 1)
        return share * x + (1 - share) * self.scaled_network(x, cond, t, s)

    def jump_to_end(self, x: th.Tensor, t: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy windows at t, (B, H, D)
        :param t: noise levels, (B,), or (1,) when all rows share one
        :param cond: condition, (B, F)
        :return: G(x, t, sigma_min | cond), (B, H, D)
        """
        return self(x, t, th.full_like(t, self.sigma_min), cond)  # type: ignore[no-any-return]

    def warm_start(self, teacher: EDMModel) -> None:
        """
        Start from the teacher: g(x, t, s) = D(x, t) for every s.

        :param teacher: denoiser of the same backbone
        """
        self.network.warm_start(teacher.network)

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
        Distillation loss plus denoising loss; ``target`` is the teacher's denoiser, ``progress`` is not used.

        See :meth:`GenerativeModel.loss` for the parameters.

        :raises ValueError: if there is no teacher
        """
        if target is None:
            raise ValueError("target: the distillation loss needs the teacher's denoiser, got None.")
        distillation = self.distillation_loss(x0, cond, noise=noise, u=u[:, :2], teacher=target)
        return distillation + self.denoising_loss(x0, cond, noise=noise, u=u[:, 2:])[0]

    def distillation_loss(
        self, x0: th.Tensor, cond: th.Tensor, *, noise: th.Tensor, u: th.Tensor, teacher: Denoiser
    ) -> th.Tensor:
        """
        A jump from t to s must end where the jump to s from the teacher's next point ends.

        Both ends are carried to sigma_min by the network without gradient and compared there:
        d(sg G(G(x_t, t, s), s, sigma_min), sg G(G(x_u, u, s), s, sigma_min)), x_u one Heun step of the teacher below x_t.
        t is uniform over the grid above sigma_min, s over the levels below t, u is the level below t.

        Source: Kim et al. 2023 (CTM), equation 9; Duan et al. 2026 (RACTD), equation 7. There u may equal t, which
        gives no signal.

        :param x0: windows, (B, H, D)
        :param cond: condition, (B, F)
        :param noise: standard normal noise, (B, H, D)
        :param u: uniform numbers in [0, 1), (B, 2)
        :param teacher: the teacher's denoiser
        :return: loss, (B,)
        """
        # rounding may lift a product to its upper end
        level = (1 + (u[:, 0] * (self.n_levels - 1)).floor()).clamp(max=self.n_levels - 1)
        end_level = th.minimum((u[:, 1] * level).floor(), level - 1)
        t, below, s = (self.sigma_at(n) for n in (level, level - 1, end_level))
        frozen = {name: p.detach() for name, p in self.named_parameters()}

        def jump(x: th.Tensor, start: th.Tensor, end: th.Tensor) -> th.Tensor:
            """Without a gradient for the weights, with one for ``x``."""
            return functional_call(self, frozen, (x, start, end, cond))  # type: ignore[no-any-return]

        x_t, lowest = x0 + t.view(-1, 1, 1) * noise, th.full_like(s, self.sigma_min)
        with th.no_grad():
            # by the frozen weights: older PyTorch's autocast keeps what it casts here, for the prediction, without gradient
            target = jump(jump(heun_step(teacher, x_t, t, below), below, s), s, lowest)
        return window_distance(jump(self(x_t, t, s, cond), s, lowest), target, self.distillation_metric)

    def denoising_loss(self, x0: th.Tensor, cond: th.Tensor, *, noise: th.Tensor, u: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Weighted error of the clean window, half of it at log-normal noise levels, half at high ones.

        Source: Kim et al. 2023 (CTM), section 3.2 and appendix; Duan et al. 2026 (RACTD), equation 8.

        :param x0: windows, (B, H, D)
        :param cond: condition, (B, F)
        :param noise: standard normal noise, (B, H, D)
        :param u: uniform numbers in [0, 1), (B, 2)
        :return: loss, (B,), and the predicted windows, (B, H, D)
        """
        high = self.sigma_at((1 - self.dsm_rho_share * u[:, 1]) * (self.n_levels - 1))
        t = th.where(u[:, 0] < 0.5, self.log_normal_sigma(u[:, 1]), high)
        x_t = x0 + t.view(-1, 1, 1) * noise
        prediction = self.jump_to_end(x_t, t, cond) if self.dsm_target == "jump" else self.scaled_network(x_t, cond, t, t)
        return self.weight(t) * window_distance(prediction, x0, self.metric), prediction

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        Jump from pure noise to the end; with more steps to a level between, add noise there, and jump again.

        Source: Kim et al. 2023 (CTM), algorithm 3 (gamma-sampling), clamped to [-1, 1] at the end.

        See :meth:`GenerativeModel.sample` for the parameters.
        """
        return self._jumps(noise, cond, self.ctm_gamma)

    def sample_ode(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        return self._jumps(noise, cond, gamma=0.0)

    def _jumps(self, noise: th.Tensor, cond: th.Tensor, gamma: float) -> th.Tensor:
        sigmas = sampling_sigmas(len(noise), self.sigma_min, self.sigma_max, self.rho)
        ends = [max(math.sqrt(1 - gamma**2) * below, self.sigma_min) for below in sigmas[1:]]
        jumps = list(zip(sigmas, [*ends, self.sigma_min], strict=True))
        network = self.at_levels(jumps, cond)
        x = (self.initial_noise_scale or self.sigma_max) * noise[0]
        for i, (t, s) in enumerate(jumps):
            if i > 0:
                x = x + math.sqrt(max(t**2 - jumps[i - 1][1] ** 2, 0.0)) * noise[i]
            x = th.add(s / t * x, network(x, t, s), alpha=1 - s / t)
        return clamp_action(x)

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return (n_steps or self.sampling_steps, batch_size, *self.event_shape)
