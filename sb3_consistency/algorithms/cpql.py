"""CPQL and CPIQL: Q-learning with a one-step consistency policy."""

from typing import Any, Unpack

import torch as th
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TensorDict

from sb3_consistency.algorithms.actor_critic import GenerativeActorCritic
from sb3_consistency.algorithms.consistency import ConsistencyPolicyMixin
from sb3_consistency.options import ConsistencyActorCriticArguments, StepSchedule, check_choice, check_range
from sb3_consistency.policies.policy import GenerativePolicy
from sb3_consistency.training.batches import Batch
from sb3_consistency.training.updater import LossFn
from sb3_consistency.values.losses import expectile_loss, pessimistic_value

VALUE_MODES = ("q", "iql")
VALUE_CRITICS = ("target", "current")


class CPQL(ConsistencyPolicyMixin, GenerativeActorCritic):
    """
    Consistency Policy with Q-Learning: one network pass per action, in training too.

    Objective: actor alpha L_rec + eta L_q, with the reconstruction loss L_rec; critics as in ConsistencyAC. With
    ``value_mode="iql"`` it is CPIQL: V by expectile regression on the data's actions, and r + gamma (1 - terminal)
    V(s') as the target of the critics. Source: Chen, Li & Zhao 2024 (not Conservative Peng's Q(lambda), which
    is abbreviated CPQL too).

    Differences from the released code: half of the noise levels of L_rec are those at which the policy acts
    (``policy_kwargs=dict(model_kwargs=dict(sampling_share=0.0))`` is the code); a' comes from the actor's moving average,
    as the paper writes (``target_policy="current"`` is the code); targets move at every step, from the first; the actor's
    learning rate is 3e-3 offline (3e-4), and learning rates fall to 0 offline; the noise embedding is smooth
    (``policy_kwargs=dict(embedding_scale=250.0)`` is the code); critics have LayerNorm online too
    (``policy_kwargs=dict(layer_norm=False)`` switches it off); V of CPIQL has LayerNorm, regresses on the target critics,
    has its own optimizer and is not clipped with them; online, the Q term is normalised, from scratch it stands alone
    (there with alpha 0.05), and time-limits bootstrap.

    :param value_mode: "q" (CPQL) or "iql" (CPIQL)
    :param expectile: expectile of the value loss of CPIQL, in (0, 1)
    :param value_critic: critics that the value of CPIQL regresses on, "target" or "current"
    :param eta: weight of the Q term, a number or a function of the gradient step
    :param alpha: weight of the behaviour-cloning term, likewise; None for 1 offline, 0 online from scratch
    :param sampling_steps: network evaluations K per action
    :param bc_loss: "ict", "consistency" or "reconstruction"
    :param kwargs: see :class:`~sb3_consistency.algorithms.actor_critic.GenerativeActorCritic`,
        :class:`~sb3_consistency.algorithms.consistency.ConsistencyPolicyMixin` and
        :class:`~sb3_consistency.options.SharedArguments`
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
        bc_loss: str = "reconstruction",
        **kwargs: Unpack[ConsistencyActorCriticArguments],
    ) -> None:
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
            bc_loss=bc_loss,
            **kwargs,
        )

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("value_mode", self.value_mode, VALUE_MODES)
        check_choice("value_critic", self.value_critic, VALUE_CRITICS)
        check_range("expectile", self.expectile, 0, 1, open_low=True)
        if self.expectile == 1:
            raise ValueError("expectile must be below 1, got 1.")

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
