"""RACTD: a one-step planner, distilled from a diffusion planner with rewards."""

from collections.abc import Mapping
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import Schedule, TensorDict
from torch.nn import functional as F

from sb3_consistency.generative.edm import EDMModel
from sb3_consistency.generative.temporal import coloured_noise
from sb3_consistency.generative.trajectory import JumpOptions, TrajectoryConsistencyModel
from sb3_consistency.options import option
from sb3_consistency.planning.plan_data import PlanBatch
from sb3_consistency.planning.plan_networks import PlanNetwork, RewardModel
from sb3_consistency.planning.planning import PlanningAlgorithm
from sb3_consistency.planning.stages import NETWORK_OF_STAGE
from sb3_consistency.policies.modules import Follow, Network
from sb3_consistency.training.updater import LossFn

REWARD_INPUTS = ("sample", "denoised")
DISTILL_FROM = ("raw", "ema")


class RACTD(JumpOptions, PlanningAlgorithm):
    r"""
    Reward-aware consistency trajectory distillation: plans a whole window in one network pass.

    Three stages, walked through by ``learn(n)`` or ``pretrain(n)``:

    1. teacher: a denoiser D of windows x, given the present observation;
    2. reward: R, the discounted return that follows a state and an action in the data;
    3. student G, a jump from noise level t to s, warm-started from the teacher and distilled from it, with rewards.

    .. math::

        L_\mathrm{teacher} &= \mathbb{E}\, w(\sigma)\, d(D(x + \sigma z, \sigma), x), \qquad
        L_\mathrm{reward} = \mathbb{E}\, (R(s, a) - \textstyle\sum_k \gamma^k r_k)^2 \\
        L_\mathrm{student} &= \alpha L_\mathrm{CTM} + \beta L_\mathrm{DSM} + \omega L_R, \qquad
        L_\mathrm{CTM} = \mathbb{E}\, d\big(G(G(x_t, t, s), s, \sigma_\mathrm{min}),\
        G(G(x_u, u, s), s, \sigma_\mathrm{min})\big) \\
        L_\mathrm{DSM} &= \mathbb{E}\, w(t)\, d(g(x_t, t), x), \qquad L_R = -\mathbb{E}\, R(s, \hat x), \quad
        \hat x = G(\sigma_\mathrm{max} z, \sigma_\mathrm{max}, \sigma_\mathrm{min})

    :math:`x_u` is one Heun step of the frozen teacher from :math:`x_t`, :math:`\omega` the ``reward_weight``.

    Source: Duan et al. 2026 (RACTD), equations 6 to 9. ``reward_weight=0`` is the reward-free student (CTD).
    Needs data, no environment: ``learn(n)`` takes n gradient steps on the dataset. Before the student stage ``predict``
    raises, unless the teacher plans (``planning_with``, ``teacher_plan``). A planner that remembers (``executed_steps``,
    ``history``, plans of states) hands its memory out as SB3's recurrent policies do:
    ``action, state = predict(obs, state, episode_start)``.

    Differences from the released code: the maths is selectable where paper and code differ (docs/algorithms/ractd.md
    has the table); windows are padded at the end of an episode; log-normal noise levels are clamped to the grid; a jump
    is always compared across one whole step of the teacher; samplers start from N(0, sigma_max^2); the networks are
    small by default; one batch size serves all stages; the observation enters through an encoder, as features do in SB3;
    R has LayerNorm and is taught to be low off the data; a plan of states that is over is renewed.
    """

    learning_rate: float | Schedule = 1e-3
    alpha: float = option(default=1.0, low=0, doc="weight of the distillation loss L_CTM")
    beta: float = option(default=1.0, low=0, doc="weight of the denoising loss L_DSM", search=(0.1, 10.0, "log"))
    reward_weight: float = option(default=0.3, low=0, doc="weight of L_R (the paper's sigma)", search=(0.01, 1.0, "log"))
    reward_input: str = option(
        default="sample",
        one_of=REWARD_INPUTS,
        doc='what R judges: "sample", a plan from pure noise (paper), or "denoised", the denoising loss\'s (code)',
    )
    reward_support: float = option(
        default=10.0,
        low=0,
        doc="how fast R is taught to fall off the data, to half the range of returns below it: by 1 - exp(-reward_support d) "
        "at a mean squared distance d (actions and R scaled to [-1, 1]); 0 in the paper, where the student exploits what R "
        "makes up there",
    )
    distill_from: str = option(
        default="raw", one_of=DISTILL_FROM, doc='"raw" weights of the teacher (code) or their moving average "ema"'
    )

    def networks(self) -> Mapping[str, Network]:
        return {
            "teacher_model": Network(PlanNetwork, {"model_class": EDMModel}, {"teacher_ema": Follow(self.teacher_ema_share)}),
            "student": Network(PlanNetwork, {"model_class": TrajectoryConsistencyModel}),
            "reward_model": Network(RewardModel),
        }

    @property
    def needs_rewards(self) -> bool:
        """The reward-free student learns from none."""
        return self.reward_weight > 0

    def losses(self) -> Mapping[str, LossFn]:
        losses = {"teacher": self.teacher_loss, "reward": self.reward_loss, "student": self.student_loss}
        return {NETWORK_OF_STAGE[self.stage]: losses[self.stage]}

    def teacher_loss(self, batch: PlanBatch) -> tuple[th.Tensor, TensorDict]:
        """
        :param batch: windows
        :return: denoising loss of the teacher, scalars to log
        """
        model = self.policy.teacher_model.model
        u = th.rand(len(batch.plans), model.n_uniforms, device=self.device)
        cond = self.policy.teacher_model.condition(batch.conditions)
        return model.loss(batch.plans, cond, noise=th.randn_like(batch.plans), u=u).mean(), {}

    def reward_loss(self, batch: PlanBatch) -> tuple[th.Tensor, TensorDict]:
        """
        :param batch: windows
        :return: squared error of the predicted return, scalars to log
        """
        model = self.policy.reward_model
        cond, seen = model.condition(batch.reward_conditions), batch.plans[:, : model.n_seen]
        loss = F.mse_loss(model.judge(cond, seen), batch.returns)
        if self.reward_support > 0:
            u = th.rand(2, len(seen), device=self.device)
            # mostly small moves, rough and smooth ones
            moves = u[0].square().view(-1, 1, 1) * coloured_noise(th.randn_like(seen), 2 * u[1], model.cosines)
            lost = 1 - th.exp(-self.reward_support * moves.square().flatten(1).mean(dim=1))
            loss = loss + F.mse_loss(model.judge(cond, seen + moves), batch.returns - lost)
        return loss, {}

    def student_loss(self, batch: PlanBatch) -> tuple[th.Tensor, TensorDict]:
        """
        alpha L_CTM + beta L_DSM + reward_weight L_R.

        :param batch: windows
        :return: loss of the student, scalars to log
        """
        plans, student = batch.plans, self.policy.student.model
        cond = self.policy.student.condition(batch.conditions)
        u = th.rand(len(plans), student.n_uniforms, device=self.device)
        noise = th.randn(2, *plans.shape, device=self.device)
        ctm = student.distillation_loss(plans, cond, noise=noise[0], u=u[:, :2], teacher=self._teacher(batch)).mean()
        dsm, denoised = student.denoising_loss(plans, cond, noise=noise[1], u=u[:, 2:])
        dsm = dsm.mean()
        loss = self.alpha * ctm + self.beta * dsm
        metrics = {"ctm_loss": ctm.detach(), "dsm_loss": dsm.detach()}
        if self.reward_weight > 0:
            judged = denoised
            if self.reward_input == "sample":
                judged = student.sample(th.randn(student.noise_shape(len(plans), 1), device=self.device), cond)
            value = self.policy.reward_model(batch.conditions, judged).mean()
            loss = loss - self.reward_weight * value
            metrics["predicted_return"] = value.detach()
        return loss, metrics

    def _teacher(self, batch: PlanBatch) -> Any:
        teacher = self.policy.teacher_model if self.distill_from == "raw" else self.policy.teacher_ema
        with th.no_grad():
            cond = teacher.condition(batch.conditions)
        return lambda x, sigma: teacher.model(x, sigma, cond)
