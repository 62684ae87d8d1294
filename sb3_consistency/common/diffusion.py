"""What the two diffusion algorithms share: the options of the diffusion actor, and its behaviour-cloning term."""

from typing import Any

import torch as th

from sb3_consistency.common.algorithm import GenerativeAlgorithm
from sb3_consistency.common.arguments import check_range, check_texts
from sb3_consistency.common.sampling import Batch
from sb3_consistency.generative.diffusion import DiffusionModel


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
        check_texts(beta_schedule=beta_schedule, sampler=sampler)
        check_range("diffusion_steps", diffusion_steps, 1, integer=True)
        for name, steps in {
            "sampling_steps": sampling_steps,
            "train_sampling_steps": kwargs.get("train_sampling_steps"),
        }.items():
            check_range(name, steps, 1, diffusion_steps, integer=True, optional=True)
        self.diffusion_steps = diffusion_steps
        self.beta_schedule = beta_schedule
        self.sampling_steps = sampling_steps
        self.sampler = sampler
        super().__init__(*args, **kwargs)

    def policy_options(self) -> dict[str, Any]:
        model_kwargs = {
            "diffusion_steps": self.diffusion_steps,
            "beta_schedule": self.beta_schedule,
            "sampling_steps": self.sampling_steps,
            "sampler": self.sampler,
        }
        return {**super().policy_options(), "model_class": DiffusionModel, "model_kwargs": model_kwargs}

    def bc_term(self, batch: Batch) -> th.Tensor:
        """
        :param batch: transitions
        :return: mean squared error of the predicted noise, scalar
        """
        return self.policy.actor.bc_loss(batch.observations, batch.actions).mean()
