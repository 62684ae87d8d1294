"""Consistency-AC: actor-critic with a consistency policy."""

from typing import Unpack

from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_consistency.algorithms.actor_critic import GenerativeActorCritic
from sb3_consistency.algorithms.consistency import ConsistencyPolicyMixin
from sb3_consistency.options import ConsistencyActorCriticArguments, StepSchedule
from sb3_consistency.policies.policy import GenerativePolicy


class ConsistencyAC(ConsistencyPolicyMixin, GenerativeActorCritic):
    """
    Actor-critic with a consistency policy, regularised by the consistency loss on the data.

    Objective: actor alpha L_c + eta L_q, critics r + gamma (1 - terminal) min_j Q'_j(s', a'), a' from the actor's moving
    average. Source: Ding & Jin 2024, section 4.2, algorithm 1.

    Differences from the released code: the loss is improved consistency training (iCT) by default; two steps are
    {80, 2.52}, not {80, 2}; the curriculum runs over the whole training, not over every chunk of 50k steps; the loss is
    not clamped, and the Q term's gradient is projected at the bounds; the EMA actor follows at every step from the first
    (there at every fifth; it is the random initial network until step 1000); observations are standardised; loading
    restores targets and optimizers; time-outs bootstrap; the curriculum ends at 160 levels; the actor's learning rate is
    3e-3 offline (3e-4), and learning rates fall to 0 offline; no loss scaling or clipping unless asked for.

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
        eta: StepSchedule = 1.0,
        alpha: StepSchedule | None = None,
        sampling_steps: int = 2,
        bc_loss: str = "ict",
        **kwargs: Unpack[ConsistencyActorCriticArguments],
    ) -> None:
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
