"""CPQL and CPIQL: Q-learning with a one-step consistency policy."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import TensorDict

from sb3_consistency.algorithms.actor_critic import ActorCritic
from sb3_consistency.generative.consistency import ConsistencyActorOptions, ConsistencyModel
from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.options import check_range, option
from sb3_consistency.policies.modules import Network, ValueNetwork
from sb3_consistency.training.batches import Batch
from sb3_consistency.training.updater import LossFn
from sb3_consistency.values.losses import expectile_loss, pessimistic_value

VALUE_MODES = ("q", "iql")
VALUE_CRITICS = ("target", "current")


def _check_expectile(name: str, value: Any) -> None:
    check_range(name, value, 0, 1, open_low=True)
    if value == 1:
        raise ValueError(f"{name} must be below 1, got 1.")


class CPQL(ConsistencyActorOptions, ActorCritic):
    r"""
    Consistency Policy with Q-Learning: one network pass per action, in training too.

    The objective is :class:`~sb3_consistency.algorithms.actor_critic.ActorCritic`'s, with the reconstruction loss

    .. math:: L_\mathrm{bc} = \mathbb{E}\, (\sigma^{-2} + \sigma_\mathrm{data}^{-2})\, |f(a + \sigma z, \sigma | s) - a|^2.

    With ``value_mode="iql"`` it is CPIQL: V is an expectile of the critics at the data's actions, and their target:

    .. math:: L_V = \mathbb{E}\, |\tau - 1(u < 0)|\, u^2, \quad u = \min_j Q'_j(s, a) - V(s), \qquad
        y = r + \gamma (1 - d) V(s').

    Source: Chen, Li & Zhao 2024 (not Conservative Peng's Q(lambda), which is abbreviated CPQL too); Kostrikov et al. 2021.

    Differences from the released code: half of the noise levels of L_rec are those at which the policy acts
    (``policy_kwargs=dict(model_kwargs=dict(sampling_share=0.0))`` is the code); a' comes from the actor's moving average,
    as the paper writes (``target_policy="current"`` is the code); targets move at every step, from the first; the actor's
    learning rate is 3e-3 offline (3e-4), and learning rates fall to 0 offline; the noise embedding is smooth
    (``policy_kwargs=dict(embedding_scale=250.0)`` is the code); critics have LayerNorm online too
    (``policy_kwargs=dict(layer_norm=False)`` switches it off); V of CPIQL has LayerNorm, regresses on the target critics,
    has its own optimizer and is not clipped with them; online, the Q term is normalised, from scratch it stands alone
    (there with alpha 0.05), and time-limits bootstrap.
    """

    model_class: ClassVar[type[GenerativeModel]] = ConsistencyModel
    bc_loss: str = "reconstruction"
    value_mode: str = option(
        default="q", one_of=VALUE_MODES, fixed=True, doc='"q" (CPQL) or "iql" (CPIQL)', search=list(VALUE_MODES)
    )
    expectile: float = option(
        default=0.7, check=_check_expectile, doc="expectile of the value loss of CPIQL, in (0, 1)", search=(0.5, 0.95)
    )
    value_critic: str = option(
        default="target", one_of=VALUE_CRITICS, doc='critics that the value of CPIQL regresses on, "target" or "current"'
    )

    def networks(self) -> Mapping[str, Network]:
        return {**super().networks(), **({"value": Network(ValueNetwork)} if self.value_mode == "iql" else {})}

    def losses(self) -> Mapping[str, LossFn]:
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
            value: th.Tensor = self.policy.value(batch.next_observations)
            return value
        return super().next_value(batch)
