"""The control of the online suite: is a policy that carries noise worth more than SAC's Gaussian, with the same critics?"""

from typing import Any, ClassVar

from stable_baselines3 import SAC
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.sac.policies import SACPolicy
from torch import nn


class LayerNormSACPolicy(SACPolicy):
    """SAC's policy with critics whose hidden layers are normalised before their activation, as this package's are."""

    def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
        """
        :param features_extractor: one shared with the actor, or None
        :return: the critics
        """
        critic = super().make_critic(features_extractor)
        for network in critic.q_networks:
            assert isinstance(network, nn.Sequential)
            hidden = [layer for layer in network if isinstance(layer, nn.Linear)][:-1]
            # from the last on: what is put in moves those behind it
            for i, layer in reversed(list(enumerate(hidden))):
                network.insert(2 * i + 1, nn.LayerNorm(layer.out_features))
        return critic.to(self.device)


class LayerNormSAC(SAC):
    """SB3's SAC with LayerNorm in its critics, and nothing else changed."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": LayerNormSACPolicy}
