"""The policy: owns every network, acts with the actor, and picks among candidate actions by value."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_consistency.envs.spaces import action_bounds
from sb3_consistency.generative.consistency import ConsistencyModel
from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.generative.networks import Mish
from sb3_consistency.policies.modules import FeatureNetwork, GenerativeActor, GenerativeCritic, ValueNetwork, seeded_noise
from sb3_consistency.training.gradient import Compiled
from sb3_consistency.values.losses import choose_candidate, gumbel_noise, pessimistic_value

CANDIDATE_SELECTIONS = ("softmax", "argmax")


def _check_extractor(space: spaces.Space, extractor_class: type[BaseFeaturesExtractor]) -> None:
    """
    :param space: observation space
    :param extractor_class: features extractor for it
    :raises ValueError: if SB3's ``CombinedExtractor`` can't take it, or a key, because PyTorch names no module so
    """
    if not (isinstance(extractor_class, type) and issubclass(extractor_class, CombinedExtractor)):
        return
    if not isinstance(space, spaces.Dict):
        raise ValueError(f"policy: MultiInputPolicy needs Dict observations, got {space}; use MlpPolicy (images: CnnPolicy).")
    dotted = [key for key in space.spaces if "." in key]
    if dotted:
        raise ValueError(f"env: SB3's CombinedExtractor takes no keys with dots, got {dotted}: rename them in a wrapper.")


class NetworksPolicy(BasePolicy):
    """A policy that owns several networks, some with optimizers of their own, some moving averages of others."""

    share_features_extractor: bool = False

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor_class: type[BaseFeaturesExtractor],
        *,
        features_extractor_kwargs: dict[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        _check_extractor(observation_space, features_extractor_class)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            # SB3's constructor updates this dict; the caller's stays as it is
            features_extractor_kwargs=None if features_extractor_kwargs is None else dict(features_extractor_kwargs),
            squash_output=True,
            **kwargs,
        )

    def network_names(self) -> list[str]:
        """
        :return: names of all networks, the trained ones (those with an optimizer) first
        """
        raise NotImplementedError

    def trained_networks(self) -> list[str]:
        """
        :return: names of the networks that have an optimizer
        """
        raise NotImplementedError

    def target_pairs(self) -> Iterator[tuple[FeatureNetwork, FeatureNetwork]]:
        """
        :return: (network, its target network), for every target network
        """
        raise NotImplementedError

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        :param action: actions within the bounds of the action space
        :return: the same scaled to [-1, 1]
        """
        bounds = action_bounds(self.action_space)
        return ((action - bounds.middle) / bounds.half_range).clip(-1, 1).astype(np.float32)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        :param scaled_action: actions scaled to [-1, 1]
        :return: the same within the bounds of the action space, and of its type
        """
        low, high, middle, half_range = action_bounds(self.action_space)
        return (middle + half_range * scaled_action).clip(low, high).astype(self.action_space.dtype)

    def _make(self, cls: type[Any], features_extractor: BaseFeaturesExtractor | None, **kwargs: Any) -> Any:
        base = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "normalize_images": self.normalize_images,
        }
        return cls(**self._update_features_extractor({**base, **kwargs}, features_extractor)).to(self.device)

    def _add_optimizer(self, net: FeatureNetwork, lr_schedule: Schedule, **defaults: Any) -> None:
        kwargs = {**defaults, **self.optimizer_kwargs}
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not kwargs.keys() & {"fused", "foreach"}:
            kwargs["fused"] = True
        # a shared extractor is trained by the actor's loss alone, as in SAC
        shared = self.share_features_extractor and not isinstance(net, GenerativeActor)
        parameters = [p for n, p in net.named_parameters() if not (shared and n.startswith("features_extractor."))]
        net.optimizer = self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def fit_normalizer(self, mean: dict[str, np.ndarray], std: dict[str, np.ndarray]) -> None:
        """
        Set the observation statistics of every network.

        :param mean: mean per key ("" for an observation space that is no Dict)
        :param std: standard deviation per key
        """
        for name in self.network_names():
            getattr(self, name).obs_normalizer.fit(mean, std)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the trained networks in training or evaluation mode; targets stay in evaluation mode.

        :param mode: True for training mode
        """
        for name in self.trained_networks():
            network, wanted = getattr(self, name), mode and self.trains(name)
            # going through all modules takes as long as a small network's pass, and predict() asks for it every time
            if network.training != wanted:
                network.set_training_mode(wanted)
        self.training = mode

    def trains(self, name: str) -> bool:
        """
        :param name: one of :meth:`trained_networks`
        :return: whether training mode is for it, at present
        """
        return True


class GenerativePolicy(NetworksPolicy):
    """
    Policy of the generative algorithms: actor, its moving averages, critics and value network, as far as asked for.

    What the algorithm needs (``model_class``, ``target_networks`` to ``candidate_temperature``) it passes itself, and its
    part of ``model_kwargs``; ``policy_kwargs`` holds the rest.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param net_arch: hidden layer sizes of all networks, or ``dict(pi=[...], qf=[...])``
    :param activation_fn: activation class of all networks (but the "ln_resnet" backbone, which has ReLU)
    :param network: the actor's backbone, "mlp" or "ln_resnet"
    :param embedding_scale: factor of ln(sigma), or of the diffusion step, in the actor's noise-level embedding; the
        consistency papers' is 250
    :param n_critics: number of critics
    :param layer_norm: layer normalisation in critics and value network
    :param features_extractor_class: features extractor
    :param features_extractor_kwargs: its arguments
    :param share_features_extractor: whether actor, critics and value network share one extractor, trained by the actor
    :param normalize_images: whether to divide images by 255
    :param optimizer_class: optimizer of every network; Adam is used in its fused form
    :param optimizer_kwargs: its arguments, except the learning rate
    :param model_class: class of the actor's generative model
    :param model_kwargs: arguments of the model
    :param target_networks: names of the moving averages of the actor to keep
    :param use_critic: whether there are critics (and their targets)
    :param use_value: whether there is a value network
    :param n_candidates: number of actions that a stochastic prediction draws, to pick one by its value
    :param n_eval_candidates: number of fixed noise vectors that a deterministic prediction picks the best action of
    :param candidate_selection: "softmax" (probability proportional to exp(Q / temperature)) or "argmax"
    :param candidate_temperature: temperature of the softmax
    :param noise_seed: seed of the fixed noise of deterministic predictions
    :param noise_scale: its standard deviation, that of ``n_eval_candidates`` too: with 1 it is a typical sample's, and a
        constant bias; the nearer to 0, the nearer are deterministic actions to the middle of the distribution, where no
        mode may be (docs/results)
    :raises ValueError: if an option is unknown or out of its range
    """

    actor: GenerativeActor
    critic: GenerativeCritic
    critic_target: GenerativeCritic
    value: ValueNetwork

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        network: str = "mlp",
        embedding_scale: float = 1.0,
        n_critics: int = 2,
        layer_norm: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = False,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        model_class: type[GenerativeModel] = ConsistencyModel,
        model_kwargs: dict[str, Any] | None = None,
        target_networks: tuple[str, ...] = (),
        use_critic: bool = False,
        use_value: bool = False,
        n_candidates: int = 1,
        n_eval_candidates: int = 1,
        candidate_selection: str = "softmax",
        candidate_temperature: float = 1.0,
        noise_seed: int = 0,
        noise_scale: float = 0.5,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
        )
        if candidate_selection not in CANDIDATE_SELECTIONS:
            raise ValueError(f"candidate_selection must be one of {CANDIDATE_SELECTIONS}, got {candidate_selection!r}.")
        if n_critics < 1:
            raise ValueError(f"n_critics must be at least 1, got {n_critics}.")
        for name, number in {"n_candidates": n_candidates, "n_eval_candidates": n_eval_candidates}.items():
            if number < 1 or (number > 1 and not use_critic):
                raise ValueError(f"{name} must be at least 1, and exactly 1 without critics to choose by, got {number}.")
        if candidate_temperature <= 0:
            raise ValueError(f"candidate_temperature must be positive, got {candidate_temperature}.")
        self.net_arch = [256, 256, 256] if net_arch is None else net_arch
        self.activation_fn = activation_fn
        self.network = network
        self.embedding_scale = embedding_scale
        self.n_critics = n_critics
        self.layer_norm = layer_norm
        self.share_features_extractor = share_features_extractor
        self.model_class = model_class
        self.model_kwargs = dict(model_kwargs or {})
        self.target_networks = tuple(target_networks)
        self.use_critic = use_critic
        self.use_value = use_value
        self.n_candidates = n_candidates
        self.n_eval_candidates = n_eval_candidates
        self.candidate_selection = candidate_selection
        self.candidate_temperature = candidate_temperature
        self.noise_seed = noise_seed
        self.noise_scale = noise_scale
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        actor_arch, value_arch = get_actor_critic_arch(self.net_arch)
        value_kwargs: dict[str, Any] = {
            "net_arch": value_arch,
            "activation_fn": self.activation_fn,
            "layer_norm": self.layer_norm,
            "share_features_extractor": self.share_features_extractor,
        }
        critic_kwargs = {**value_kwargs, "n_critics": self.n_critics}
        self.actor = self._make_actor(actor_arch)
        self._add_optimizer(self.actor, lr_schedule)
        shared = self.actor.features_extractor if self.share_features_extractor else None
        if self.use_critic:
            self.critic = self._make(GenerativeCritic, shared, **critic_kwargs)
            self._add_optimizer(self.critic, lr_schedule)
            self.critic_target = self._make(GenerativeCritic, None, **critic_kwargs)
        if self.use_value:
            self.value = self._make(ValueNetwork, shared, **value_kwargs)
            self._add_optimizer(self.value, lr_schedule)
        for name in self.target_networks:
            setattr(self, name, self._make_actor(actor_arch))
        for source, target in self.target_pairs():
            target.load_state_dict(source.state_dict())
            target.set_training_mode(False)
            target.requires_grad_(False)
        if self.n_eval_candidates > 1:
            shape = self.actor.model.noise_shape(self.n_eval_candidates)
            self.register_buffer("noise_bank", seeded_noise(shape, self.noise_seed, self.noise_scale), persistent=False)

    noise_bank: th.Tensor

    def _make_actor(self, net_arch: list[int]) -> GenerativeActor:
        network_kwargs: dict[str, Any] = {"net_arch": net_arch, "embedding_scale": self.embedding_scale}
        if self.network == "mlp":
            network_kwargs["activation_fn"] = self.activation_fn
        network_kwargs |= self.model_kwargs.get("network_kwargs", {})
        model_kwargs = {"network": self.network, **self.model_kwargs, "network_kwargs": network_kwargs}
        actor: GenerativeActor = self._make(
            GenerativeActor,
            None,
            model_class=self.model_class,
            model_kwargs=model_kwargs,
            noise_seed=self.noise_seed,
            noise_scale=self.noise_scale,
        )
        return actor

    def network_names(self) -> list[str]:
        """
        :return: names of all networks, the trained ones (those with an optimizer) first
        """
        return [*self.trained_networks(), *(["critic_target"] if self.use_critic else []), *self.target_networks]

    def trained_networks(self) -> list[str]:
        """
        :return: names of the networks that have an optimizer
        """
        return ["actor", *(["critic"] if self.use_critic else []), *(["value"] if self.use_value else [])]

    def target_pairs(self) -> Iterator[tuple[FeatureNetwork, FeatureNetwork]]:
        """
        :return: (network, its target network), for every target network
        """
        if self.use_critic:
            yield self.critic, self.critic_target
        for name in self.target_networks:
            yield self.actor, getattr(self, name)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        n_candidates = self.n_eval_candidates if deterministic else self.n_candidates
        if n_candidates == 1:
            return self.actor(observation, deterministic)
        choose = self._compiled_choice or self._best_candidate
        return choose(observation, n_candidates, deterministic)

    _compiled_choice: Compiled | None = None

    def compile_choice(self) -> None:
        """Compile the choice among candidates, at the first prediction that draws any."""
        self._compiled_choice = Compiled(self._best_candidate, "the choice among candidates")

    def _best_candidate(self, observation: PyTorchObs, n_candidates: int, deterministic: bool) -> th.Tensor:
        """Draw candidates from the current actor, choose by the least of the target critics (Ding & Jin, code)."""
        features = self.actor.features(observation)
        batch_size = features.shape[0]
        features = features.repeat_interleave(n_candidates, dim=0)
        if deterministic:
            actions = self.actor.model.sample(self.noise_bank.repeat(1, batch_size, 1), features)
        else:
            actions = self.actor.sample(features)
        critic_features = self.critic_target.features(observation).repeat_interleave(n_candidates, dim=0)
        values = pessimistic_value(self.critic_target.q_networks(critic_features, actions)).view(batch_size, n_candidates)
        greedy = deterministic or self.candidate_selection == "argmax"
        gumbel = None if greedy else gumbel_noise(th.rand_like(values))
        return choose_candidate(
            values, actions.view(batch_size, n_candidates, actions.shape[1]), gumbel, self.candidate_temperature
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = """
            net_arch activation_fn network embedding_scale n_critics layer_norm features_extractor_class
            features_extractor_kwargs share_features_extractor optimizer_class optimizer_kwargs model_class model_kwargs
            target_networks use_critic use_value n_candidates n_eval_candidates candidate_selection candidate_temperature
            noise_seed noise_scale
        """
        # the learning rate is not needed to act
        parameters = {"lr_schedule": self._dummy_schedule, **{name: getattr(self, name) for name in names.split()}}
        return {**super()._get_constructor_parameters(), **parameters}


MlpPolicy = GenerativePolicy


class CnnPolicy(GenerativePolicy):
    """:class:`GenerativePolicy` for images: the default features extractor is SB3's ``NatureCNN``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"features_extractor_class": NatureCNN, **kwargs})


class MultiInputPolicy(GenerativePolicy):
    """:class:`GenerativePolicy` for Dict observations: the default features extractor is SB3's ``CombinedExtractor``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"features_extractor_class": CombinedExtractor, **kwargs})
