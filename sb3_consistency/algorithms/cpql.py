"""CPQL and CPIQL: Q-learning with a one-step consistency policy."""

from typing import Any, Unpack

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TensorDict

from sb3_consistency.common.actor_critic import GenerativeActorCritic
from sb3_consistency.common.algorithm import LossFn
from sb3_consistency.common.arguments import SharedArguments, StepSchedule
from sb3_consistency.common.consistency import ConsistencyPolicyMixin
from sb3_consistency.common.policies import GenerativePolicy
from sb3_consistency.common.sampling import Batch
from sb3_consistency.value_losses import expectile_loss, pessimistic_value

VALUE_MODES = ("q", "iql")
VALUE_CRITICS = ("target", "current")


class CPQL(ConsistencyPolicyMixin, GenerativeActorCritic):
    """
    Consistency Policy with Q-Learning: one network pass per action, in training too.

    Objective: actor alpha L_rec + eta L_q, with the reconstruction loss L_rec; critics as in ConsistencyAC. With
    ``value_mode="iql"`` it is CPIQL: V by expectile regression on the data's actions, and r + gamma (1 - terminal)
    V(s') as the target of the critics. Source: Chen, Li & Zhao 2024 (not Conservative Peng's Q(lambda), which
    is abbreviated CPQL too).

    Differences from the released code: a' comes from the actor's moving average, as the paper writes
    (``target_policy="current"`` is the code); targets move at every step, from the first; the noise embedding is smooth
    (``policy_kwargs=dict(embedding_scale=250.0)`` is the code); critics have LayerNorm online too
    (``policy_kwargs=dict(layer_norm=False)`` switches it off); V of CPIQL has LayerNorm, regresses on the target
    critics, has its own optimizer and is not clipped with them; online, the Q term is normalised and time-limits
    bootstrap.

    :param value_mode: "q" (CPQL) or "iql" (CPIQL)
    :param expectile: expectile of the value loss of CPIQL, in (0, 1)
    :param value_critic: critics that the value of CPIQL regresses on, "target" or "current"

    The other options are those of :class:`~sb3_consistency.common.consistency.ConsistencyPolicyMixin` and
    :class:`~sb3_consistency.common.actor_critic.GenerativeActorCritic`.

    :param kwargs: see :class:`~sb3_consistency.common.arguments.SharedArguments`
    """

    def __init__(
        self,
        policy: str | type[GenerativePolicy],
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        *,
        value_mode: str = "q",
        expectile: float = 0.7,
        value_critic: str = "target",
        eta: StepSchedule = 1.0,
        alpha: StepSchedule | None = None,
        sampling_steps: int = 1,
        train_sampling_steps: int | None = None,
        bc_loss: str = "reconstruction",
        metric: str | None = None,
        loss_scaling: bool = False,
        curriculum: tuple[int, int] | None = None,
        consistency_ema_decay: float = 0.0,
        n_candidates: int = 50,
        n_eval_candidates: int = 1,
        candidate_selection: str = "softmax",
        candidate_temperature: float = 1.0,
        max_q_backup: bool = False,
        q_norm: bool = False,
        actor_q: str = "random",
        normalize_actor_q: bool = True,
        target_policy: str = "ema",
        actor_ema_decay: float = 0.995,
        actor_ema_interval: int = 1,
        actor_ema_start: int = 0,
        **kwargs: Unpack[SharedArguments],
    ) -> None:
        if value_mode not in VALUE_MODES:
            raise ValueError(f"value_mode must be one of {VALUE_MODES}, got {value_mode!r}.")
        if value_critic not in VALUE_CRITICS:
            raise ValueError(f"value_critic must be one of {VALUE_CRITICS}, got {value_critic!r}.")
        if not 0 < expectile < 1:
            raise ValueError(f"expectile must be in (0, 1), got {expectile}.")
        self.value_mode = value_mode
        self.expectile = expectile
        self.value_critic = value_critic
        super().__init__(
            policy,
            env,
            learning_rate,
            eta=eta,
            alpha=alpha,
            sampling_steps=sampling_steps,
            train_sampling_steps=train_sampling_steps,
            bc_loss=bc_loss,
            metric=metric,
            loss_scaling=loss_scaling,
            curriculum=curriculum,
            consistency_ema_decay=consistency_ema_decay,
            n_candidates=n_candidates,
            n_eval_candidates=n_eval_candidates,
            candidate_selection=candidate_selection,
            candidate_temperature=candidate_temperature,
            max_q_backup=max_q_backup,
            q_norm=q_norm,
            actor_q=actor_q,
            normalize_actor_q=normalize_actor_q,
            target_policy=target_policy,
            actor_ema_decay=actor_ema_decay,
            actor_ema_interval=actor_ema_interval,
            actor_ema_start=actor_ema_start,
            **kwargs,
        )

    def policy_options(self) -> dict[str, Any]:
        return {**super().policy_options(), "use_value": self.value_mode == "iql"}

    def losses(self) -> dict[str, LossFn]:
        return {**({"value": self.value_loss} if self.value_mode == "iql" else {}), **super().losses()}

    def value_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        Expectile regression of V(s) on min_j Q_j(s, a) at the data's actions (Kostrikov et al. 2021, equation 5).

        :param batch: transitions
        :return: loss of the value network, scalars to log
        """
        critic = self.policy.critic_target if self.value_critic == "target" else self.policy.critic
        with th.no_grad():
            q_value = pessimistic_value(critic(batch.observations, batch.actions))
        return expectile_loss(q_value - self.policy.value(batch.observations), self.expectile), {}

    def next_value(self, batch: Batch) -> th.Tensor:
        if self.value_mode == "iql":
            return self.policy.value(batch.next_observations)
        return super().next_value(batch)
