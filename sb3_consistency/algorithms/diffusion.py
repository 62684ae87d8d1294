"""What the two diffusion algorithms share: the options of the diffusion actor, and its behaviour-cloning term."""

from typing import Any

import torch as th

from sb3_consistency.generative.diffusion import SAMPLERS, DiffusionModel
from sb3_consistency.generative.schedules import BETA_SCHEDULES
from sb3_consistency.options import check_choice, check_range
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch


class DiffusionPolicyMixin(GenerativeAlgorithm):
    """
    Options of a diffusion actor.

    :param diffusion_steps: number T of noise levels
    :param beta_schedule: "vp" or "cosine"
    :param sampling_steps: network evaluations per action, at most T; None for T
    :param sampler: "ddpm" (ancestral sampling) or "ddim" (deterministic given its first noise)
    """

    def __init__(
        self,
        *args: Any,
        diffusion_steps: int,
        beta_schedule: str,
        sampling_steps: int | None,
        sampler: str,
        **kwargs: Any,
    ) -> None:
        self.diffusion_steps = diffusion_steps
        self.beta_schedule = beta_schedule
        self.sampling_steps = sampling_steps
        self.sampler = sampler
        super().__init__(*args, **kwargs)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("beta_schedule", self.beta_schedule, tuple(BETA_SCHEDULES))
        check_choice("sampler", self.sampler, SAMPLERS)
        check_range("diffusion_steps", self.diffusion_steps, 1, integer=True)
        # the second is an actor-critic's
        for name in ("sampling_steps", "train_sampling_steps"):
            check_range(name, vars(self).get(name), 1, self.diffusion_steps, integer=True, optional=True)

    def policy_options(self) -> dict[str, Any]:
        model_kwargs = {
            "diffusion_steps": self.diffusion_steps,
            "beta_schedule": self.beta_schedule,
            "sampling_steps": self.sampling_steps,
            "sampler": self.sampler,
        }
        return {**super().policy_options(), "model_class": DiffusionModel, "model_kwargs": model_kwargs}

    def bc_term(self, batch: Batch, features: th.Tensor) -> th.Tensor:
        """
        :param batch: transitions
        :param features: the actor's features of their observations, (B, F)
        :return: mean squared error of the predicted noise, scalar
        """
        return self.policy.actor.bc_loss(features, batch.actions).mean()
