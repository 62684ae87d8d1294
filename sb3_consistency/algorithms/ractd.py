"""RACTD: a one-step planner, distilled from a diffusion planner with rewards."""

from typing import Any, Unpack

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TensorDict
from torch.nn import functional as F

from sb3_consistency.generative.temporal import coloured_noise
from sb3_consistency.options import SharedArguments, check_choice, check_range
from sb3_consistency.planning.planner import PlannerPolicy
from sb3_consistency.planning.planning import PlanBatch, PlanningAlgorithm
from sb3_consistency.planning.stages import NETWORK_OF_STAGE
from sb3_consistency.training.updater import LossFn

REWARD_INPUTS = ("sample", "denoised")
DISTILL_FROM = ("raw", "ema")


class RACTD(PlanningAlgorithm):
    """
    Reward-aware consistency trajectory distillation: plans a whole window in one network pass.

    Three stages, walked through by ``learn(n)`` or ``pretrain(n)``:

    1. teacher: an EDM denoiser of windows, given the present observation;
    2. reward: R, the discounted return that follows a state and an action in the data;
    3. student, warm-started from the teacher: alpha L_CTM + beta L_DSM + reward_weight L_R, L_R = -E[R(plan)].

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

    :param plan_of: "actions": plan the next actions and replan; "states": plan the states to a goal and track them
    :param horizon: number H of actions or states of a plan
    :param stride: steps of the environment from one planned state to the next; plans of actions have all, 1
    :param history: number of observations that a plan of actions is conditioned on
    :param executed_steps: environment steps until the next plan is made; None for 1 (actions) or the plan's own, (H - 1)
        ``stride`` (states). More than that hold the end of a plan of states at rest; more than an episode has are the
        paper's open loop
    :param tracking_gains: gains of position and velocity of the controller that tracks a plan of states
    :param pad: whether windows may run past the end of an episode, repeating its last action (or state, at rest)
    :param cut_at_goals: whether, for plans of states, a window ends where the goal changes, too
    :param teacher_steps: gradient steps of the teacher stage; a float is a share of the run
    :param reward_steps: gradient steps of the reward stage, likewise; the student takes what is left of the run
    :param teacher: file of a saved model whose teacher is taken over; the teacher stage is left out then
    :param sampling_steps: jumps, that is network passes, per plan
    :param alpha: weight of the distillation loss L_CTM
    :param beta: weight of the denoising loss L_DSM
    :param reward_weight: weight of L_R (the paper's sigma)
    :param reward_input: what R judges: "sample", a plan from pure noise (paper), or "denoised", the prediction of the
        denoising loss (code)
    :param reward_horizon: number of a plan's actions that R sees; 1 in the paper
    :param reward_support: how fast R is taught to fall off the data, to half the range of returns below it: by
        1 - exp(-reward_support d) at a mean squared distance d (actions and R scaled to [-1, 1]); 0 in the paper, where
        the student exploits what R makes up there
    :param distill_from: "raw" weights of the teacher (code) or their moving average "ema"
    :param warmup_steps: gradient steps over which the learning rate rises in every stage, at most a tenth of it
    :param kwargs: see :class:`~sb3_consistency.options.SharedArguments`
    :raises ValueError: if an argument is out of its range
    """

    def __init__(
        self,
        policy: str | type[PlannerPolicy],
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        *,
        plan_of: str = "actions",
        horizon: int = 16,
        stride: int = 1,
        history: int = 1,
        executed_steps: int | None = None,
        tracking_gains: tuple[float, float] = (1.0, 1.0),
        pad: bool = True,
        cut_at_goals: bool = True,
        teacher_steps: int | float = 0.4,
        reward_steps: int | float = 0.1,
        teacher: str | None = None,
        sampling_steps: int = 1,
        alpha: float = 1.0,
        beta: float = 1.0,
        reward_weight: float = 0.3,
        reward_input: str = "sample",
        reward_horizon: int = 1,
        reward_support: float = 10.0,
        distill_from: str = "raw",
        warmup_steps: int = 500,
        **kwargs: Unpack[SharedArguments],
    ) -> None:
        self.sampling_steps = sampling_steps
        self.alpha = alpha
        self.beta = beta
        self.reward_weight = reward_weight
        self.reward_input = reward_input
        self.reward_horizon = reward_horizon
        self.reward_support = reward_support
        self.distill_from = distill_from
        super().__init__(
            policy,
            env,
            learning_rate,
            plan_of=plan_of,
            horizon=horizon,
            stride=stride,
            history=history,
            executed_steps=executed_steps,
            tracking_gains=tracking_gains,
            pad=pad,
            cut_at_goals=cut_at_goals,
            teacher_steps=teacher_steps,
            reward_steps=reward_steps,
            teacher=teacher,
            warmup_steps=warmup_steps,
            **kwargs,
        )

    def _check_arguments(self) -> None:
        super()._check_arguments()
        for name in ("alpha", "beta", "reward_weight", "reward_support"):
            check_range(name, getattr(self, name), 0)
        for name in ("sampling_steps", "reward_horizon"):
            check_range(name, getattr(self, name), 1, integer=True)
        check_choice("reward_input", self.reward_input, REWARD_INPUTS)
        check_choice("distill_from", self.distill_from, DISTILL_FROM)

    def policy_options(self) -> dict[str, Any]:
        options = {"sampling_steps": self.sampling_steps, "reward_horizon": self.reward_horizon}
        return {**super().policy_options(), **options}

    def losses(self) -> dict[str, LossFn]:
        losses = {"teacher": self.teacher_loss, "reward": self.reward_loss, "student": self.student_loss}
        return {NETWORK_OF_STAGE[self.stage]: losses[self.stage]}  # type: ignore[dict-item]

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
