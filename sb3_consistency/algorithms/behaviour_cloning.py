"""What the two behaviour-cloning algorithms share: they learn offline, and their one loss is the model's."""

from typing import ClassVar

import torch as th
from stable_baselines3.common.type_aliases import TensorDict

from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch
from sb3_consistency.training.updater import LossFn


class BehaviourCloning(GenerativeAlgorithm):
    """Trains the actor alone, on a dataset: ``learn(n)`` takes n gradient steps."""

    offline_only: ClassVar[bool] = True

    def losses(self) -> dict[str, LossFn]:
        return {"actor": self.actor_loss}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        :param batch: transitions
        :return: loss of the actor, scalars to log
        """
        return self.bc_term(batch, self.policy.actor.features(batch.observations)), {}

    def bc_term(self, batch: Batch, features: th.Tensor) -> th.Tensor:
        """
        :param batch: transitions
        :param features: the actor's features of their observations, (B, F)
        :return: behaviour-cloning loss of the actor, scalar
        """
        raise NotImplementedError
