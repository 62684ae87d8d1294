"""The policy: owns every network, acts with the actor, and picks among candidate actions by value."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

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

from sb3_consistency.compiled import Compiled
from sb3_consistency.data.checks import map_observations
from sb3_consistency.envs.spaces import action_bounds
from sb3_consistency.generative.consistency import ConsistencyModel
from sb3_consistency.options import Options, option, shared_options
from sb3_consistency.policies.chunks import ChunkPolicy
from sb3_consistency.policies.modules import (
    CriticOptions,
    FeatureNetwork,
    GenerativeActor,
    GenerativeCritic,
    Network,
    NoiseOptions,
    ValueNetwork,
    check_net_arch,
    in_parts,
    present_values,
)
from sb3_consistency.values.losses import choose_candidate, gumbel_noise, pessimistic_value

ACTORS = ("ema", "current")
CANDIDATE_SELECTIONS = ("softmax", "argmax")
#: candidates that are evaluated together: more rows need more memory, and leave the cache
MAX_CANDIDATE_ROWS = 2**13
#: candidates of a stochastic prediction, where they are not told
N_CANDIDATES = 50


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


class NetworksPolicy(Options, BasePolicy):
    """
    A policy that owns several networks, some with optimizers of their own, some moving averages of others.

    :raises ValueError: if an option is unknown or out of its range
    """

    observation_space: spaces.Space = option(sb3=True, kw_only=False, doc="observation space")
    action_space: spaces.Box = option(sb3=True, kw_only=False, doc="action space")
    lr_schedule: Schedule = option(sb3=True, kw_only=False, doc="learning rate schedule")
    networks: Mapping[str, Network] | None = option(
        default=None, fixed=True, doc="the networks, by name; None for an actor alone. The algorithm passes them"
    )
    features_extractor_class: type[BaseFeaturesExtractor] = option(
        default=FlattenExtractor, sb3=True, doc="features extractor"
    )
    features_extractor_kwargs_: dict[str, Any] | None = option(
        alias="features_extractor_kwargs", default=None, sb3=True, doc="its arguments"
    )
    normalize_images: bool = option(default=True, sb3=True, doc="whether to divide images by 255")
    optimizer_class: type[th.optim.Optimizer] = option(
        default=th.optim.Adam, sb3=True, doc="optimizer of every network; Adam is used in its fused form"
    )
    optimizer_kwargs_: dict[str, Any] | None = option(
        alias="optimizer_kwargs", default=None, sb3=True, doc="its arguments, except the learning rate"
    )
    fixed_until: ClassVar[str] = "build a new model with it"
    #: networks whose moving averages are made after all others: the order decides on the random numbers that they begin with
    targets_last: ClassVar[tuple[type[FeatureNetwork], ...]] = ()

    def construct(self, values: dict[str, Any]) -> None:
        self.store(values)
        _check_extractor(self.observation_space, self.features_extractor_class)
        extractor_kwargs = values["features_extractor_kwargs"]
        super(Options, self).__init__(
            self.observation_space,
            self.action_space,
            self.features_extractor_class,
            # SB3's constructor updates this dict; the caller's stays as it is
            features_extractor_kwargs=None if extractor_kwargs is None else dict(extractor_kwargs),
            normalize_images=self.normalize_images,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            squash_output=True,
        )
        self.check_options()
        self._build(vars(self).pop("lr_schedule"))
        self._is_built = True

    @property
    def is_built(self) -> bool:
        return "_is_built" in vars(self)

    def option_changed(self, name: str, value: Any) -> None:
        for module in list(self.modules())[1:]:
            if name in shared_options(type(module), type(self)):
                setattr(module, name, value)

    @property
    def structure(self) -> Mapping[str, Network]:
        """The networks, by name: those that are trained, with the names of their moving averages."""
        assert self.networks is not None
        return self.networks

    def network_kwargs(self, network: Network) -> dict[str, Any]:
        """
        :param network: one of :attr:`structure`
        :return: arguments of its class
        """
        shared = {name: getattr(self, name) for name in shared_options(network.cls, type(self))}
        return {**shared, **network.kwargs}

    def _build(self, lr_schedule: Schedule) -> None:
        shared: BaseFeaturesExtractor | None = None
        for name, network in self.structure.items():
            is_actor = issubclass(network.cls, GenerativeActor)
            module = self._make(network, None if is_actor else shared)
            setattr(self, name, module)
            if is_actor and shared is None and getattr(self, "share_features_extractor", False):
                shared = module.features_extractor
            self._add_optimizer(name, lr_schedule)
            if not issubclass(network.cls, self.targets_last):
                self._make_targets(network)
        for network in self.structure.values():
            if issubclass(network.cls, self.targets_last):
                self._make_targets(network)
        for source, target in self.target_pairs():
            target.load_state_dict(source.state_dict())
            target.set_training_mode(False)
            target.requires_grad_(False)

    def _make_targets(self, network: Network) -> None:
        for name in network.targets:
            setattr(self, name, self._make(network, None))

    def _make(self, network: Network, features_extractor: BaseFeaturesExtractor | None) -> Any:
        base = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "normalize_images": self.normalize_images,
        }
        kwargs = {**base, **self.network_kwargs(network)}
        return network.cls(**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def new_network(self, network: Network) -> Any:
        """
        :param network: declaration of a network
        :return: one of this policy's architecture, which is no part of it, with fresh weights
        """
        return self._make(network, None)

    def _add_optimizer(self, name: str, lr_schedule: Schedule) -> None:
        net: FeatureNetwork = getattr(self, name)
        kwargs = {**self.optimizer_defaults(name), **(self.optimizer_kwargs or {})}
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not kwargs.keys() & {"fused", "foreach"}:
            kwargs["fused"] = True
        # a shared extractor is trained by the actor's loss alone, as in SAC
        shared = getattr(self, "share_features_extractor", False) and not isinstance(net, GenerativeActor)
        parameters = [p for n, p in net.named_parameters() if not (shared and n.startswith("features_extractor."))]
        net.optimizer = self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def optimizer_defaults(self, name: str) -> dict[str, Any]:
        """
        :param name: one of :meth:`trained_networks`
        :return: arguments of its optimizer that ``optimizer_kwargs`` may overrule
        """
        return {}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # the learning rate is not needed to act
        return {**self.option_values(), "networks": self._present_networks(), "lr_schedule": self._dummy_schedule}

    def _present_networks(self) -> Mapping[str, Network]:
        """The networks as options have changed them since they were made."""
        present = {}
        for name, network in self.structure.items():
            kwargs = dict(network.kwargs)
            if "model_kwargs" in kwargs:
                kwargs["model_kwargs"] = present_values(getattr(self, name).model, kwargs["model_kwargs"])
            present[name] = replace(network, kwargs=kwargs)
        return present

    def network_names(self) -> list[str]:
        """
        :return: names of all networks, the trained ones (those with an optimizer) first
        """
        return [*self.structure, *(name for network in self.structure.values() for name in network.targets)]

    def trained_networks(self) -> list[str]:
        """
        :return: names of the networks that have an optimizer
        """
        return list(self.structure)

    def target_pairs(self) -> Iterator[tuple[FeatureNetwork, FeatureNetwork]]:
        """
        :return: (network, its moving average), for every moving average
        """
        for name, network in self.structure.items():
            for target in network.targets:
                yield getattr(self, name), getattr(self, target)

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
        for name in self.structure:
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


class ActingOptions(Options):
    """Which actor acts, and how one of several candidate actions is picked by its value."""

    deterministic_policy: str = option(
        default="ema",
        one_of=ACTORS,
        before="current",
        doc='actor of deterministic actions, of a policy that learned online from scratch: "ema" (the average of its last '
        'tenth of training, where ``target_policy="ema"`` keeps one) or "current"; others take the current one',
    )
    n_candidates: int | None = option(
        default=1,
        low=1,
        doc="actions drawn per stochastic prediction, of which one is picked by its value; None for 50, and for 1 of a "
        "policy that explores by noise: with a temperature, or added after an offline phase",
        search={"online": [1, 10, 50]},
    )
    n_eval_candidates: int = option(
        default=1,
        low=1,
        doc="fixed noise vectors per deterministic prediction, of which the best action is taken",
        # trials are evaluated deterministically: offline, n_candidates would change nothing
        search={"offline": [1, 5, 20]},
    )
    candidate_selection: str = option(
        default="softmax",
        one_of=CANDIDATE_SELECTIONS,
        doc='"softmax" (probability proportional to exp(Q / temperature)) or "argmax"',
    )
    candidate_temperature: float = option(default=1.0, above=0, doc="temperature of the softmax")


class GenerativePolicy(ActingOptions, NoiseOptions, CriticOptions, ChunkPolicy, NetworksPolicy):
    """
    Policy of the generative algorithms: actor, its moving averages, critics and value network, as far as asked for.

    What the algorithm has options for (``networks``, those of :class:`ActingOptions` and of
    :class:`~sb3_consistency.policies.chunks.ChunkOptions`) it passes itself, and its part of ``model_kwargs``;
    ``policy_kwargs`` holds the rest.

    :raises ValueError: if an option is unknown or out of its range
    """

    actor: GenerativeActor = option(init=False)
    actor_target: GenerativeActor = option(init=False)
    critic: GenerativeCritic = option(init=False)
    critic_target: GenerativeCritic = option(init=False)
    value: ValueNetwork = option(init=False)
    targets_last: ClassVar[tuple[type[FeatureNetwork], ...]] = (GenerativeActor,)

    net_arch: list[int] | dict[str, list[int]] | None = option(
        default=None,
        check=check_net_arch,
        fixed=True,
        doc="hidden layer sizes of all networks, or ``dict(pi=[...], qf=[...])``; None for three of 256 (two, as SAC, of an "
        "algorithm with a temperature whose constructor is given no dataset), in a U-Net channels 64-128-256",
    )
    network: str = option(default="mlp", fixed=True, doc='the actor\'s backbone, "mlp", "ln_resnet" or "unet"')
    embedding_scale: float = option(
        default=1.0,
        fixed=True,
        doc="factor of ln(sigma), or of the diffusion step, in the actor's noise-level embedding; the papers' is 250",
    )
    layer_norm: bool = True
    model_kwargs: dict[str, Any] | None = option(default=None, fixed=True, doc="arguments of the actor's generative model")

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self._compiled_choice = None

    def check_together(self) -> None:
        super().check_together()
        for name in ("n_candidates", "n_eval_candidates"):
            if (getattr(self, name) or 1) > 1 and "critic" not in self.structure:
                raise ValueError(f"{name} must be 1: there are no critics to choose by, got {getattr(self, name)}.")
        if self.n_eval_candidates > 1 and self.noise_scale == 0:
            raise ValueError(
                "n_eval_candidates must be 1 where noise_scale is 0, which makes all candidates one, "
                f"got {self.n_eval_candidates}: pass policy_kwargs=dict(noise_scale=0.5)."
            )

    @property
    def structure(self) -> Mapping[str, Network]:
        if self.networks is None:
            kwargs = {"model_class": ConsistencyModel, "model_kwargs": {"horizon": self.horizon}}
            return {"actor": Network(GenerativeActor, kwargs)}
        return self.networks

    def network_kwargs(self, network: Network) -> dict[str, Any]:
        kwargs = super().network_kwargs(network)
        default = {"pi": [64, 128, 256] if self.network == "unet" else [256, 256, 256], "qf": [256, 256, 256]}
        arch = get_actor_critic_arch(default if self.net_arch is None else self.net_arch)
        archs = dict(zip(("pi", "qf"), arch, strict=True))
        if issubclass(network.cls, GenerativeActor):
            # the user's are the acting model's: a teacher of another class takes none of them
            acts = kwargs["model_class"] is self.structure["actor"].kwargs["model_class"]
            given = {**kwargs["model_kwargs"], **((self.model_kwargs if acts else None) or {})}
            kwargs["model_kwargs"] = self._model_kwargs(given, archs["pi"])
        else:
            kwargs["net_arch"] = archs[network.cls.arch]
        return kwargs

    def _model_kwargs(self, own: dict[str, Any], net_arch: list[int]) -> dict[str, Any]:
        network_kwargs: dict[str, Any] = {"net_arch": net_arch, "embedding_scale": self.embedding_scale}
        if self.network != "ln_resnet":
            network_kwargs["activation_fn"] = self.activation_fn
        given = {"network": self.network, **own}
        return {**given, "network_kwargs": {**network_kwargs, **(given.get("network_kwargs") or {})}}

    def bc_term(self, obs: PyTorchObs, features: th.Tensor, actions: th.Tensor, progress: th.Tensor | None) -> th.Tensor:
        """
        Behaviour-cloning term: the loss of the actor's generative model on the data's actions.

        :param obs: observations, (B, ...), or (B, h, ...)
        :param features: the actor's features of them, (B, h F)
        :param actions: chunks of scaled actions, (B, H A)
        :param progress: share of the curriculum that is done, scalar; None for its end
        :return: mean loss, scalar
        """
        name, target = self.actor.model.regression_target, None
        if name is not None and hasattr(self, name):
            with th.no_grad():
                target = getattr(self, name).denoiser(obs)
        return self.actor.bc_loss(features, actions, target, progress).mean()

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        chunks = self._choose(self.repeat(observation) if self.history > 1 else observation, deterministic)
        return chunks if self.horizon == 1 else chunks[:, : self.plan_shape[1]]

    @property
    def plan_shape(self) -> tuple[int, int]:
        return self.actor.plan_shape

    def make_plans(self, history: PyTorchObs, deterministic: bool) -> th.Tensor:
        seen = history if self.history > 1 else map_observations(lambda x: x[:, 0], history)
        return self._choose(seen, deterministic).unflatten(1, self.plan_shape)

    def acting(self, deterministic: bool) -> GenerativeActor:
        """
        :param deterministic: whether to act deterministically
        :return: the actor that does so, see ``deterministic_policy``
        """
        averages = deterministic and self.deterministic_policy == "ema" and self.actor.model.is_from_scratch
        return self.actor_target if averages and "actor_target" in self.structure["actor"].targets else self.actor

    def _choose(self, observation: PyTorchObs, deterministic: bool) -> th.Tensor:
        """Chunks of scaled actions, (B, H A), for observations, (B, ...) or (B, h, ...)."""
        n_candidates = self.n_eval_candidates if deterministic else self.n_candidates
        if n_candidates is None:
            has_choice = "critic" in self.structure and not self.actor.model.explores
            n_candidates = N_CANDIDATES if has_choice else 1
        if n_candidates == 1:
            return self.acting(deterministic)(observation, deterministic)
        noise = self.actor.fixed_noise(n_candidates, self.device) if deterministic else None
        choose = self._compiled_choice or self._best_candidate
        at_once = max(1, MAX_CANDIDATE_ROWS // n_candidates)
        return in_parts(lambda part: choose(part, n_candidates, noise), observation, at_once)

    _compiled_choice: Compiled | None = option(init=False)

    def compile_choice(self, compile: bool) -> None:
        """
        Compile the choice among candidates, at the first prediction that draws any.

        :param compile: False to leave it uncompiled
        """
        self._compiled_choice = Compiled(self._best_candidate, "the choice among candidates") if compile else None

    def _best_candidate(self, observation: PyTorchObs, n_candidates: int, noise: th.Tensor | None) -> th.Tensor:
        """Draw candidates from the actor, choose by the least of the target critics (Ding & Jin, code)."""
        actor = self.acting(noise is not None)
        features = actor.features(observation)
        batch_size = features.shape[0]
        features = features.repeat_interleave(n_candidates, dim=0)
        if noise is not None:
            actions = actor.model.sample(noise.repeat(1, batch_size, 1), features)
        else:
            actions = actor.sample(features)
        critic_features = self.critic_target.features(observation).repeat_interleave(n_candidates, dim=0)
        values = pessimistic_value(self.critic_target.q_networks(critic_features, actions)).view(batch_size, n_candidates)
        greedy = noise is not None or self.candidate_selection == "argmax"
        gumbel = None if greedy else gumbel_noise(th.rand_like(values))
        return choose_candidate(
            values, actions.view(batch_size, n_candidates, actions.shape[1]), gumbel, self.candidate_temperature
        )


MlpPolicy = GenerativePolicy


class CnnPolicy(GenerativePolicy):
    """:class:`GenerativePolicy` for images: the default features extractor is SB3's ``NatureCNN``."""

    features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN


class MultiInputPolicy(GenerativePolicy):
    """:class:`GenerativePolicy` for Dict observations: the default features extractor is SB3's ``CombinedExtractor``."""

    features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor
