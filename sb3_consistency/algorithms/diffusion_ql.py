"""Diffusion-QL: actor-critic with a diffusion policy."""

from typing import Unpack

from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_consistency.algorithms.actor_critic import GenerativeActorCritic
from sb3_consistency.algorithms.diffusion import DiffusionPolicyMixin
from sb3_consistency.options import ActorCriticArguments, StepSchedule
from sb3_consistency.policies.policy import GenerativePolicy


class DiffusionQL(DiffusionPolicyMixin, GenerativeActorCritic):
    """
    Actor-critic with a diffusion policy: the many-step peer of ConsistencyAC and CPQL.

    Objective: actor alpha L_eps + eta L_q, with the Q gradient through all sampling steps; critics as in
    ConsistencyAC. Source: Wang et al. 2022 (Diffusion-QL), algorithm 1.

    Differences from the released code: predicted clean actions are clamped with the gradient projected at the bounds,
    not cut; the EMA actor follows at every step from the first (there at every fifth, from step 1000); critics have
    LayerNorm (``policy_kwargs=dict(layer_norm=False)`` switches it off); observations are standardised; the actor's
    learning rate is 3e-3 offline (3e-4), and learning rates fall to 0 offline; no clipping unless asked for; DDIM
    sampling with fewer steps is an option; time-outs bootstrap.

    :param eta: weight of the Q term, a number or a function of the gradient step
    :param alpha: weight of the behaviour-cloning term, likewise; None for 1 offline, 0 online from scratch
    :param diffusion_steps: number T of noise levels
    :param beta_schedule: "vp" or "cosine"
    :param sampling_steps: network evaluations per action, at most T; None for T
    :param sampler: "ddpm" (ancestral sampling) or "ddim" (deterministic given its first noise)
    :param kwargs: see :class:`~sb3_consistency.algorithms.actor_critic.GenerativeActorCritic` and
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
        diffusion_steps: int = 5,
        beta_schedule: str = "vp",
        sampling_steps: int | None = None,
        sampler: str = "ddpm",
        **kwargs: Unpack[ActorCriticArguments],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            eta=eta,
            alpha=alpha,
            diffusion_steps=diffusion_steps,
            beta_schedule=beta_schedule,
            sampling_steps=sampling_steps,
            sampler=sampler,
            **kwargs,
        )
