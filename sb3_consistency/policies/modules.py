"""SB3 modules around the pure networks: preprocessing, normalisation and feature extraction, then the network."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_consistency.generative.model import Denoiser, GenerativeModel
from sb3_consistency.options import check_range
from sb3_consistency.policies.normalizer import ObservationNormalizer
from sb3_consistency.values.critics import StackedCritic, StackedMlp


class FeatureNetwork(BaseModel):
    """
    Base of actor, critic and value network: turns observations into features.

    :param observation_space: observation space
    :param action_space: action space
    :param features_extractor: network that extracts features (a CNN for images, flattening otherwise)
    :param features_dim: size F of the features
    :param normalize_images: whether to divide images by 255
    """

    features_extractor: BaseFeaturesExtractor
    #: whether the extractor is another network's (the actor's), whose loss alone trains it
    share_features_extractor: bool = False

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        normalize_images: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images, **kwargs
        )
        self.features_dim = features_dim
        self.action_dim = get_action_dim(action_space)
        self.obs_normalizer = ObservationNormalizer(observation_space)

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations as the replay buffer holds them, (B, ...) or a dict
        :return: features, (B, F)
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        preprocessed = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        return features_extractor(self.obs_normalizer(preprocessed))


class GenerativeActor(FeatureNetwork, BasePolicy):
    """
    The actor: a generative model of scaled actions, conditioned on observation features.

    With a :class:`~sb3_consistency.generative.consistency.ConsistencyModel` it is the consistency actor.

    :param model_class: class of the generative model, called with (action_dim, features_dim, **model_kwargs)
    :param model_kwargs: further arguments of the model
    :param noise_seed: seed of the fixed noise that deterministic actions start from
    :param noise_scale: its standard deviation
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        model_class: Callable[..., GenerativeModel],
        model_kwargs: dict[str, Any],
        noise_seed: int = 0,
        noise_scale: float = 0.5,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor, features_dim, normalize_images, squash_output=True
        )
        self.model = model_class(self.action_dim, features_dim, **model_kwargs)
        # one vector for all rows, reproducible and not zero: by symmetry, zero lands between modes
        noise = seeded_noise(self.model.noise_shape(1), noise_seed, noise_scale)
        self.register_buffer("fixed_noise", noise, persistent=False)

    fixed_noise: th.Tensor

    def denoiser(self, obs: PyTorchObs) -> Denoiser:
        """
        :param obs: observations, (B, ...)
        :return: this actor's denoiser with the observations as condition
        """
        cond = self.features(obs)
        return lambda x, sigma: self.model(x, sigma, cond)

    def bc_loss(
        self, features: th.Tensor, actions: th.Tensor, target: Denoiser | None = None, progress: th.Tensor | None = None
    ) -> th.Tensor:
        """
        Behaviour-cloning loss with fresh noise.

        :param features: observation features, (B, F)
        :param actions: scaled actions, (B, A)
        :param target: denoiser that supplies the regression targets; the actor itself when None
        :param progress: share of the training run that is done, scalar
        :return: loss of every row, (B,)
        """
        noise = th.randn_like(actions)
        u = th.rand(actions.shape[0], self.model.n_uniforms, device=actions.device)
        return self.model.loss(actions, features, noise=noise, u=u, target=target, progress=progress)

    def sample(self, features: th.Tensor, n_steps: int | None = None) -> th.Tensor:
        """
        Sample one action per row with fresh noise, differentiably.

        :param features: observation features, (B, F)
        :param n_steps: number of network evaluations; None for the model's default
        :return: scaled actions, (B, A)
        """
        noise = th.randn(self.model.noise_shape(features.shape[0], n_steps), device=features.device)
        return self.model.sample(noise, features)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        features = self.features(observation)
        if not deterministic:
            return self.sample(features)
        return self.model.sample(self.fixed_noise.expand(-1, features.shape[0], -1), features)


class GenerativeCritic(FeatureNetwork):
    """
    Q(s, a) of several critics, as one batched network.

    :param net_arch: hidden layer sizes
    :param activation_fn: activation class
    :param n_critics: number of critics
    :param layer_norm: normalise the hidden layers
    :param share_features_extractor: the extractor is the actor's, trained by the actor's loss only
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        n_critics: int = 2,
        layer_norm: bool = False,
        share_features_extractor: bool = False,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(observation_space, action_space, features_extractor, features_dim, normalize_images)
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        self.q_networks = StackedCritic(features_dim, self.action_dim, net_arch, n_critics, activation_fn, layer_norm)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations, (B, ...)
        :param actions: scaled actions, (B, A)
        :return: Q-values, (B, n_critics)
        """
        return self.q_networks(self.features(obs), actions)


class ValueNetwork(FeatureNetwork):
    """
    V(s) of implicit Q-learning.

    :param net_arch: hidden layer sizes
    :param activation_fn: activation class
    :param layer_norm: normalise the hidden layers
    :param share_features_extractor: the extractor is the actor's, trained by the actor's loss only
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        layer_norm: bool = False,
        share_features_extractor: bool = False,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(observation_space, action_space, features_extractor, features_dim, normalize_images)
        self.share_features_extractor = share_features_extractor
        self.value_net = StackedMlp(features_dim, net_arch, activation_fn=activation_fn, layer_norm=layer_norm)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations, (B, ...)
        :return: values, (B, 1)
        """
        return self.value_net(self.features(obs))


def seeded_noise(shape: tuple[int, ...], noise_seed: int, noise_scale: float) -> th.Tensor:
    """
    Normal noise that depends on nothing but its arguments.

    :param shape: shape of the noise
    :param noise_seed: seed
    :param noise_scale: standard deviation
    :return: float32 noise on the CPU
    :raises ValueError: if the standard deviation is negative
    """
    check_range("noise_scale", noise_scale, 0)
    return th.as_tensor(noise_scale * np.random.default_rng(noise_seed).standard_normal(shape), dtype=th.float32)
