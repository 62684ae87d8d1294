"""Diffusion-BC: behaviour cloning with a diffusion policy."""

from typing import Unpack

from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_consistency.algorithms.behaviour_cloning import BehaviourCloning
from sb3_consistency.algorithms.diffusion import DiffusionPolicyMixin
from sb3_consistency.options import SharedArguments
from sb3_consistency.policies.policy import GenerativePolicy


class DiffusionBC(DiffusionPolicyMixin, BehaviourCloning):
    """
    Behaviour cloning with a diffusion policy: offline, without rewards; the many-step peer of ConsistencyBC.

    Objective: the squared error of the predicted noise on the data's actions. Source: Wang et al. 2022 (Diffusion-BC).

    Needs data, no environment: ``learn(n)`` takes n gradient steps on the dataset.

    Differences from the released code: the learning rate starts at 3e-3 and decays to 0, as for ConsistencyBC (3e-4,
    constant); no moving average of the actor; DDIM sampling with fewer steps is an option.

    :param diffusion_steps: number T of noise levels
    :param beta_schedule: "vp" or "cosine"
    :param sampling_steps: network evaluations per action, at most T; None for T
    :param sampler: "ddpm" (ancestral sampling) or "ddim" (deterministic given its first noise)
    :param kwargs: see :class:`~sb3_consistency.options.SharedArguments`
    """

    def __init__(
        self,
        policy: str | type[GenerativePolicy],
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-3,
        *,
        diffusion_steps: int = 5,
        beta_schedule: str = "vp",
        sampling_steps: int | None = None,
        sampler: str = "ddpm",
        **kwargs: Unpack[SharedArguments],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            diffusion_steps=diffusion_steps,
            beta_schedule=beta_schedule,
            sampling_steps=sampling_steps,
            sampler=sampler,
            **kwargs,
        )
