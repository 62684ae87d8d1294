"""Consistency-BC: behaviour cloning with a consistency policy."""

from typing import Unpack

from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_consistency.algorithms.behaviour_cloning import BehaviourCloning
from sb3_consistency.algorithms.consistency import ConsistencyPolicyMixin
from sb3_consistency.options import ConsistencyBCArguments
from sb3_consistency.policies.policy import GenerativePolicy


class ConsistencyBC(ConsistencyPolicyMixin, BehaviourCloning):
    """
    Behaviour cloning with a consistency policy: offline, without rewards, and acts in one or two network passes.

    Objective: the consistency loss of the actor on the data's actions. Source: Ding & Jin 2024, section 4.1.

    Needs data, no environment: ``learn(n)`` takes n gradient steps on the dataset.

    Differences from the released code: the loss is improved consistency training (iCT) by default, because the
    paper's needs far more than 100k steps (``bc_loss="consistency", consistency_ema_decay=0.999`` is close to it);
    the curriculum runs over the whole training and ends at 160 levels; the loss is not clamped; two steps are {80, 2.52},
    not {80, 2};
    the network has CM's input scaling c_in and a smooth log-noise embedding; the learning rate starts at 3e-3 and
    decays to 0 (3e-4, constant).

    :param sampling_steps: network evaluations K per action
    :param bc_loss: "ict", "consistency" or "reconstruction"
    :param kwargs: see :class:`~sb3_consistency.algorithms.consistency.ConsistencyPolicyMixin` and
        :class:`~sb3_consistency.options.SharedArguments`
    """

    def __init__(
        self,
        policy: str | type[GenerativePolicy],
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-3,
        *,
        sampling_steps: int = 1,
        bc_loss: str = "ict",
        **kwargs: Unpack[ConsistencyBCArguments],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            sampling_steps=sampling_steps,
            bc_loss=bc_loss,
            **kwargs,
        )
