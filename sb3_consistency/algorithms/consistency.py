"""What the three consistency algorithms share: the options of the consistency actor, and its behaviour-cloning term."""

from typing import Any

import torch as th

from sb3_consistency.generative.consistency import BC_LOSSES, METRICS, ConsistencyModel
from sb3_consistency.options import check_choice, check_flags, check_pair, check_range
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch


class ConsistencyPolicyMixin(GenerativeAlgorithm):
    """
    Options of a consistency actor.

    :param sampling_steps: network evaluations K per action
    :param bc_loss: "ict", "consistency" or "reconstruction", see :class:`ConsistencyModel`
    :param metric: distance of the consistency losses, "l2" or "pseudo_huber"; None for the source's own
    :param loss_scaling: weight "consistency" by 100 / (sigma_{n+1} - sigma_n)
    :param curriculum: first and last number of noise levels; None for (10, 160) with "ict", (2, 150) with "consistency"
    :param consistency_ema_decay: decay per gradient step of the moving average that supplies the regression targets of
        "consistency"; 0 regresses on the current network (no gradient), which learns sooner
    """

    def __init__(
        self,
        *args: Any,
        sampling_steps: int,
        bc_loss: str,
        metric: str | None = None,
        loss_scaling: bool = False,
        curriculum: tuple[int, int] | None = None,
        consistency_ema_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.sampling_steps = sampling_steps
        self.bc_loss = bc_loss
        self.metric = metric
        self.loss_scaling = loss_scaling
        self.curriculum = curriculum
        self.consistency_ema_decay = consistency_ema_decay
        super().__init__(*args, **kwargs)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("bc_loss", self.bc_loss, BC_LOSSES)
        if self.metric is not None:
            check_choice("metric", self.metric, METRICS)
        check_range("consistency_ema_decay", self.consistency_ema_decay, 0, 1)
        check_flags(loss_scaling=self.loss_scaling)
        check_range("sampling_steps", self.sampling_steps, 1, integer=True)
        if self.curriculum is not None:
            check_pair("curriculum", self.curriculum, 2, integer=True)

    @property
    def _has_consistency_target(self) -> bool:
        return self.bc_loss == "consistency" and self.consistency_ema_decay > 0

    def policy_options(self) -> dict[str, Any]:
        model_kwargs = {
            "sampling_steps": self.sampling_steps,
            "bc_loss": self.bc_loss,
            "metric": self.metric,
            "loss_scaling": self.loss_scaling,
            "curriculum": None if self.curriculum is None else tuple(self.curriculum),
        }
        options = super().policy_options()
        targets = (*options["target_networks"], *(["consistency_target"] if self._has_consistency_target else []))
        return {**options, "model_class": ConsistencyModel, "model_kwargs": model_kwargs, "target_networks": targets}

    def target_weights(self) -> list[float]:
        ours = [1 - self.consistency_ema_decay] if self._has_consistency_target else []
        return [*super().target_weights(), *ours]

    def bc_term(self, batch: Batch, features: th.Tensor) -> th.Tensor:
        """
        :param batch: transitions
        :param features: the actor's features of their observations, (B, F)
        :return: mean behaviour-cloning loss of the actor, scalar
        """
        target = None
        if self._has_consistency_target:
            with th.no_grad():
                target = getattr(self.policy, "consistency_target").denoiser(batch.observations)  # noqa: B009
        return self.policy.actor.bc_loss(features, batch.actions, target, self.progress).mean()
