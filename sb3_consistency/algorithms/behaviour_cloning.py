"""Behaviour cloning: the objective that ConsistencyBC and DiffusionBC share."""

from collections.abc import Mapping
from typing import ClassVar

import torch as th
from stable_baselines3.common.type_aliases import Schedule, TensorDict

from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.policies.modules import Network
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch
from sb3_consistency.training.updater import LossFn


class BehaviourCloning(GenerativeAlgorithm):
    """Trains the actor alone, on a dataset, by its generative model's own loss: ``learn(n)`` takes n gradient steps."""

    model_class: ClassVar[type[GenerativeModel]]
    offline_only: ClassVar[bool] = True
    learning_rate: float | Schedule = 3e-3

    def networks(self) -> Mapping[str, Network]:
        return {"actor": self.actor_network()}

    def losses(self) -> Mapping[str, LossFn]:
        return {"actor": self.actor_loss}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        :param batch: transitions
        :return: loss of the actor, scalars to log
        """
        features = self.policy.actor.features(batch.observations)
        return self.policy.bc_term(batch.observations, features, batch.actions, self.progress), {}
