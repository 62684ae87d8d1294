"""SB3 modules around the pure networks: preprocessing, normalisation and feature extraction, then the network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_consistency.data.checks import map_observations
from sb3_consistency.generative.exploration import Explored
from sb3_consistency.generative.model import Denoiser, GenerativeModel, HorizonOptions
from sb3_consistency.generative.networks import Mish
from sb3_consistency.generative.schedules import cached
from sb3_consistency.options import Options, option, options_of
from sb3_consistency.policies.normalizer import ObservationNormalizer
from sb3_consistency.values.critics import StackedCritic, StackedMlp

#: states, and actions in each, that the logged spread of actions is taken over
SPREAD_STATES, SPREAD_ACTIONS = 64, 16


@dataclass(frozen=True)
class Follow:
    """
    How a moving average follows its network.

    :param share: how far it moves towards the network in one update, or a function of the number of updates
    :param interval: updates between two moves
    :param start: number of updates in which it just equals the network
    """

    share: float | Callable[[int], float]
    interval: int = 1
    start: int = 0

    def weight(self, n_updates: int) -> float:
        """
        :param n_updates: number of updates, the present one included
        :return: how far it moves now; 0 for not at all
        """
        if n_updates <= self.start:
            return 1.0
        if n_updates % self.interval:
            return 0.0
        return self.share(n_updates) if callable(self.share) else self.share


@dataclass(frozen=True)
class Network:
    """
    One network of an algorithm: what is trained, and which moving averages follow it.

    :param cls: its class
    :param kwargs: what it needs beyond the options that it shares with the policy
    :param targets: name of a moving average -> how it follows
    """

    cls: "type[FeatureNetwork]"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, Follow | None] = field(default_factory=dict)

    def of_model(self, **kwargs: Any) -> "Network":
        """
        :param kwargs: arguments of its generative model
        :return: the network with them
        """
        return replace(self, kwargs={**self.kwargs, "model_kwargs": {**self.kwargs["model_kwargs"], **kwargs}})

    def structure(self) -> "Network":
        """
        :return: the network without the rules of its moving averages: what a policy is built from, and saved with
        """
        return replace(self, kwargs=dict(self.kwargs), targets=dict.fromkeys(self.targets))


def present_values(model: Options, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param model: a generative model
    :param given: the arguments that it was made with
    :return: what they are by now: options may be changed on a model
    """
    declared = options_of(type(model))
    return {name: getattr(model, declared[name].attribute) for name in given}


def check_net_arch(name: str, value: Any) -> None:
    """
    :param name: name of the argument, for the message
    :param value: hidden layer sizes
    :raises ValueError: if it is neither a list of positive integers nor such lists by "pi" and "qf"
    """
    lists = [value.get("pi"), value.get("qf")] if isinstance(value, dict) and value.keys() == {"pi", "qf"} else [value]
    for widths in lists:
        if not (isinstance(widths, list) and all(isinstance(w, (int, np.integer)) and w > 0 for w in widths)):
            raise ValueError(
                f"{name} must be a list of layer sizes like [256, 256], or dict(pi=[...], qf=[...]), got {value!r}."
            )


class HistoryOptions(Options):
    """How many observations are seen at once."""

    history: int = option(
        default=1,
        low=1,
        fixed=True,
        before=1,
        doc="number h of observations that are seen at once, the present one last; before an episode's first stands its first",
    )


class FeatureNetwork(HistoryOptions, BaseModel):
    """Base of actor, critic and value network: turns observations into features."""

    fixed_until: ClassVar[str] = "build a new model with it"
    #: whose layers of ``net_arch`` it has, "pi" or "qf"
    arch: ClassVar[str] = "qf"

    observation_space: spaces.Space = option(sb3=True, doc="observation space")
    action_space: spaces.Box = option(sb3=True, doc="action space")
    features_extractor: BaseFeaturesExtractor = option(
        sb3=True, doc="network that extracts features (a CNN for images, flattening otherwise)"
    )
    features_dim: int = option(fixed=True, doc="size F of the features")
    normalize_images: bool = option(default=True, sb3=True, doc="whether to divide images by 255")
    optimizer: th.optim.Optimizer = option(init=False)

    def construct(self, values: dict[str, Any]) -> None:
        self.store({name: value for name, value in values.items() if name != "features_extractor"})
        squash: dict[str, Any] = {"squash_output": True} if isinstance(self, BasePolicy) else {}
        super(Options, self).__init__(
            self.observation_space,
            self.action_space,
            features_extractor=values["features_extractor"],
            normalize_images=self.normalize_images,
            **squash,
        )
        self.check_options()
        self.action_dim = get_action_dim(self.action_space)
        self.obs_normalizer = ObservationNormalizer(self.observation_space)
        self.build()
        self._is_built = True

    @property
    def is_built(self) -> bool:
        return "_is_built" in vars(self)

    def build(self) -> None:
        """Make what comes after the features."""

    @property
    def has_shared_extractor(self) -> bool:
        """Whether the extractor is another network's (the actor's), whose loss alone trains it."""
        return bool(vars(self).get("share_features_extractor"))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        values = self.option_values()
        if "model_kwargs" in values:
            values["model_kwargs"] = present_values(getattr(self, "model"), values["model_kwargs"])  # noqa: B009
        return values

    @property
    def condition_dim(self) -> int:
        """Size h F of what :meth:`features` returns."""
        return self.history * self.features_dim

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations as the replay buffer holds them, (B, ...) or a dict; with a history of several (B, h, ...)
        :return: features, (B, F), or those of every observation side by side, (B, h F)
        """
        if self.history > 1:
            obs = map_observations(lambda x: x.flatten(0, 1), obs)
        with th.set_grad_enabled(th.is_grad_enabled() and not self.has_shared_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return features.view(-1, self.condition_dim) if self.history > 1 else features

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        preprocessed = preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)
        return features_extractor(self.obs_normalizer(preprocessed))


class NoiseOptions(Options):
    """The fixed noise of deterministic predictions."""

    noise_seed: int = option(default=0, low=0, size=False, doc="seed of the fixed noise of deterministic predictions")
    noise_scale: float = option(
        default=0.5,
        low=0,
        doc="its standard deviation, that of ``n_eval_candidates`` too: with 1 it is a typical sample's, and a constant bias; "
        "the nearer to 0, the nearer are deterministic actions to the middle of the distribution, where no mode may be",
    )


class ActingNetwork(NoiseOptions, FeatureNetwork):
    """A network that makes plans out of noise: what acts, and is exported."""

    model: Any = option(init=False)

    @property
    def plan_shape(self) -> tuple[int, int]:
        """Shape (H, D) of a plan."""
        raise NotImplementedError

    def fixed_noise(self, n: int, device: th.device) -> th.Tensor:
        """
        Noise of deterministic predictions: the same for all rows, reproducible and not zero (by symmetry, zero lands between
        modes).

        :param n: number of noise vectors
        :param device: where to
        :return: (S, n, *E), or (1, n, *E) where all S are the same
        """
        raise NotImplementedError

    def from_noise(self, obs: PyTorchObs, noise: th.Tensor, deterministic: bool) -> th.Tensor:
        """
        :param obs: observations, (B, ...), with a history (B, h, ...), or a dict of them
        :param noise: standard normal noise, (S, B, *E)
        :param deterministic: whether the noise is the fixed one
        :return: scaled plans, (B, H, D)
        """
        raise NotImplementedError


class GenerativeActor(ActingNetwork, HorizonOptions, BasePolicy):
    """
    The actor: a generative model of chunks of scaled actions, conditioned on observation features. A chunk is one long
    action, (H A,), for a horizon of 1 an action.

    With a :class:`~sb3_consistency.generative.consistency.ConsistencyModel` it is the consistency actor.
    """

    arch: ClassVar[str] = "pi"

    model_class: Callable[..., GenerativeModel] = option(
        fixed=True,
        doc="class of the generative model, called with (action_dim, condition_dim, **model_kwargs)",
    )
    model_kwargs: dict[str, Any] = option(fixed=True, doc="further arguments of the model")

    def build(self) -> None:
        self.model = self.model_class(self.action_dim, self.condition_dim, **self.model_kwargs)

    @property
    def plan_shape(self) -> tuple[int, int]:
        return self.horizon, self.action_dim

    def from_noise(self, obs: PyTorchObs, noise: th.Tensor, deterministic: bool) -> th.Tensor:
        chunks: th.Tensor = self.model.sample(noise, self.features(obs))
        return chunks.unflatten(1, self.plan_shape)

    def fixed_noise(self, n: int, device: th.device) -> th.Tensor:
        return self._seeded_noise(n, self.noise_seed, self.noise_scale, device)

    def _seeded_noise(self, n: int, seed: int, scale: float, device: th.device) -> th.Tensor:
        """Noise of actions without what is added to explore."""
        noise, n_added = seeded_noise(self.model.noise_shape(n), seed, scale, device), self.model.n_added
        return F.pad(noise[: len(noise) - n_added], (0, 0) * (noise.ndim - 1) + (0, n_added)) if n_added else noise

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

        :param features: observation features, (B, h F)
        :param actions: chunks of scaled actions, (B, H A)
        :param target: denoiser that supplies the regression targets; the actor itself when None
        :param progress: share of the training run that is done, scalar
        :return: loss of every row, (B,)
        """
        noise = th.randn_like(actions)
        u = th.rand(actions.shape[0], self.model.n_uniforms, device=actions.device)
        return self.model.loss(actions, features, noise=noise, u=u, target=target, progress=progress)

    def noise(self, features: th.Tensor, n_steps: int | None = None) -> th.Tensor:
        """
        :param features: observation features, (B, F)
        :param n_steps: number S of network evaluations; None for the model's default
        :return: fresh noise for one action per row, (S, B, A)
        """
        return th.randn(self.model.noise_shape(features.shape[0], n_steps), device=features.device)

    def sample(self, features: th.Tensor, n_steps: int | None = None) -> th.Tensor:
        """
        Sample one chunk of actions per row with fresh noise, differentiably.

        :param features: observation features, (B, h F)
        :param n_steps: number of network evaluations; None for the model's default
        :return: scaled actions, (B, H A)
        """
        return self.model.sample(self.noise(features, n_steps), features)

    def explore(self, features: th.Tensor, shift_cost: float) -> Explored:
        """
        Sample one chunk of actions per row that explores, with fresh noise, differentiably.

        :param features: observation features, (B, h F)
        :param shift_cost: see :func:`~sb3_consistency.generative.exploration.pair_cost`
        :return: actions, with what they cost
        """
        noise = th.randn(self.model.exploring_noise_shape(len(features)), device=features.device)
        explored: Explored = self.model.explore(noise, features, shift_cost)
        return explored

    def action_stds(self, obs: PyTorchObs) -> tuple[float, float]:
        """
        :param obs: states, of which the first 64 are taken, (B, ...)
        :return: standard deviation of the scaled actions in a state, mean over states and dimensions; the same without the
            noise that is added to them. It leaves the random generators alone
        """
        some = map_observations(lambda x: x[:SPREAD_STATES], obs)
        with th.no_grad():
            features = self.features(some).repeat_interleave(SPREAD_ACTIONS, dim=0)
            noises = (
                seeded_noise(self.model.noise_shape(len(features)), 0, 1.0, features.device),
                self._seeded_noise(len(features), 0, 1.0, features.device),
            )
            actions = (self.model.sample(noise, features).unflatten(0, (-1, SPREAD_ACTIONS)) for noise in noises)
            all_of_it, of_z = (float(x.std(dim=1).mean()) for x in actions)
            return all_of_it, of_z

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)[:, : self.action_dim]

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: observations, (B, ...), or (B, h, ...)
        :param deterministic: from the fixed noise
        :return: chunks of scaled actions, (B, H A)
        """
        features = self.features(obs)
        if not deterministic:
            return self.sample(features)
        return self.model.sample(self.fixed_noise(1, features.device).expand(-1, features.shape[0], -1), features)


class ValueOptions(Options):
    """What critics and value network have in common."""

    activation_fn: type[nn.Module] = option(
        default=Mish,
        fixed=True,
        doc='activation class of all networks (but the "ln_resnet" backbone); ReLU where they are SAC\'s',
    )
    layer_norm: bool = option(
        default=False, fixed=True, doc="layer normalisation in critics and value network", search=[False, True]
    )
    share_features_extractor: bool = option(
        default=False, fixed=True, doc="whether actor, critics and value network share one extractor, trained by the actor"
    )


class CriticOptions(ValueOptions):
    """What critics can be told."""

    n_critics: int = option(default=2, low=1, fixed=True, doc="number of critics")
    n_quantiles: int = option(
        default=1,
        low=1,
        fixed=True,
        before=1,
        doc="quantiles of the return that each critic learns, as TQC's do (25 there); 1 learns its mean",
    )


class GenerativeCritic(CriticOptions, HorizonOptions, FeatureNetwork):
    """Q(s, a) of several critics, as one batched network; a is a chunk of actions."""

    net_arch: list[int] = option(fixed=True, doc="hidden layer sizes")

    def build(self) -> None:
        sizes = self.condition_dim, self.horizon * self.action_dim
        self.q_networks = StackedCritic(
            *sizes, self.net_arch, self.n_critics, self.activation_fn, self.layer_norm, self.n_quantiles
        )

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations, (B, ...), or (B, h, ...)
        :param actions: chunks of scaled actions, (B, H A)
        :return: Q-values, (B, n_critics)
        """
        return self.q_networks(self.features(obs), actions)

    def quantiles(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations, (B, ...), or (B, h, ...)
        :param actions: chunks of scaled actions, (B, H A)
        :return: quantiles of the return, in no order, (B, n_critics, n_quantiles)
        """
        return self.q_networks.quantiles(self.features(obs), actions)


class ValueNetwork(ValueOptions, FeatureNetwork):
    """V(s) of implicit Q-learning."""

    net_arch: list[int] = option(fixed=True, doc="hidden layer sizes")

    def build(self) -> None:
        self.value_net = StackedMlp(
            self.condition_dim, self.net_arch, activation_fn=self.activation_fn, layer_norm=self.layer_norm
        )

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations, (B, ...)
        :return: values, (B, 1)
        """
        return self.value_net(self.features(obs))


def count_rows(obs: PyTorchObs) -> int:
    """
    :param obs: observations, (B, ...), or a dict of them
    :return: B
    """
    return len(next(iter(obs.values())) if isinstance(obs, dict) else obs)


def in_parts(function: Callable[[PyTorchObs], th.Tensor], obs: PyTorchObs, at_once: int) -> th.Tensor:
    """
    Bound the memory of a function that treats rows alike.

    :param function: function of observations (N, ...), with N rows of results
    :param obs: observations, (B, ...), or a dict of them
    :param at_once: rows that it is given at most
    :return: results, (B, ...)
    """
    n_rows = count_rows(obs)
    if n_rows <= at_once:
        return function(obs)
    starts = range(0, n_rows, at_once)
    return th.cat([function(map_observations(lambda x, s=s: x[s : s + at_once], obs)) for s in starts])


@cached
def seeded_noise(shape: tuple[int, ...], noise_seed: int, noise_scale: float, device: th.device) -> th.Tensor:
    """
    Normal noise that depends on nothing but its arguments.

    :param shape: shape of the noise
    :param noise_seed: seed
    :param noise_scale: standard deviation
    :param device: where to
    :return: float32 noise
    """
    noise = noise_scale * np.random.default_rng(noise_seed).standard_normal(shape)
    with th.inference_mode(False):
        return th.as_tensor(noise, dtype=th.float32, device=device)
