"""SB3's hooks around the parts: construction, the phases of ``learn``, gradient steps, saving and loading."""

import inspect
import io
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, ClassVar, Never

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict, TrainFreq
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.compiled import can_compile
from sb3_consistency.data.checks import DatasetError, as_count
from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.data.opening import dataset_spaces, open_datasets
from sb3_consistency.data.rewards import RewardFunction
from sb3_consistency.data.safe_file import warn_of_pickle, wrote_pickle
from sb3_consistency.data.safe_state import is_safe_path, load_buffer, save_buffer
from sb3_consistency.envs.spaces import (
    adopted_spaces,
    check_action_space,
    check_environment,
    check_observation_space,
    check_vec_normalize,
    fitting_policy,
)
from sb3_consistency.envs.wrappers import SpacesOnlyEnv, flatten_if_nested
from sb3_consistency.files.run import Run
from sb3_consistency.files.zip import ModelFileError, load_model
from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.options import Options, argument_names, check_keys, did_you_mean, option, options_of, shared_options
from sb3_consistency.policies.chunks import ChunkOptions, PlanMemory
from sb3_consistency.policies.modules import Follow, GenerativeActor, Network
from sb3_consistency.policies.policy import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_consistency.registry import ALGORITHMS
from sb3_consistency.resume.callback import Resumption
from sb3_consistency.resume.run_state import truncate_last_episodes
from sb3_consistency.training.arguments import TrainingOptions, check_policy_kwargs, explain_unknown, gradient_steps_online
from sb3_consistency.training.batches import CHUNK, CHUNK_BYTES, bytes_per_transition, samples_as_sb3
from sb3_consistency.training.gradient import check_precision
from sb3_consistency.training.offline_data import OfflineData
from sb3_consistency.training.pretraining import learn_offline, pretrain
from sb3_consistency.training.progress import PhaseProgress
from sb3_consistency.training.scores import with_scores
from sb3_consistency.training.updater import LossFn, RunningMeans, Updater

if TYPE_CHECKING:
    from typing import Self


#: gradient steps of a run from which on compiling saves more time than it takes (docs/performance.md)
COMPILING_PAYS = 20_000
#: buffers whose windows can be read in the place of what they sample
KNOWN_BUFFERS = (ReplayBuffer, DictReplayBuffer, FrameReplayBuffer, HerReplayBuffer)
KNOWN_SAMPLING = [(buffer.sample, buffer._get_samples) for buffer in KNOWN_BUFFERS]


class GenerativeAlgorithm(ChunkOptions, TrainingOptions, OffPolicyAlgorithm):
    """
    Base of the generative algorithms, which supply :meth:`networks` and :meth:`losses`.

    :raises ValueError: if an argument is out of its range
    :raises UnsupportedSpaceError: if the action space is not a bounded Box
    :raises TypeError: if an argument is unknown
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    #: the actor's generative model
    model_class: ClassVar[type[GenerativeModel] | None] = None
    #: the part that loads datasets, and keeps them through online training
    data_class: ClassVar[type[OfflineData]] = OfflineData
    #: whether :meth:`learn` takes gradient steps on a dataset instead of collecting experience
    offline_only: ClassVar[bool] = False
    #: whether :meth:`predict` works already (a staged planner's does so late)
    can_act: ClassVar[bool] = True

    # the parts, of which only the run is saved
    policy: Any = option(init=False)
    run: Run = option(init=False)
    data: OfflineData = option(init=False)
    updater: Updater = option(init=False)
    resumption: Resumption = option(init=False)
    #: what the policy remembers of the environments that experience is collected in; None without a memory
    memory: PlanMemory | None = option(init=False)
    #: share of the curriculum that is done, scalar in [0, 1]; None stands for its end
    progress: th.Tensor | None = option(init=False)
    in_offline_phase: bool = option(init=False)

    def networks(self) -> Mapping[str, Network]:
        """
        The network that acts, and is exported, is called "actor"; a shared features extractor is the first actor's. They are
        made in this order.

        :return: what is trained, by name (no option's), and which moving averages follow it how at present
        """
        raise NotImplementedError

    def actor_network(self, **targets: Follow) -> Network:
        """
        :param targets: moving averages that the algorithm needs, and how they follow
        :return: a network that acts: the generative model with the options that it shares with the algorithm, and the moving
            averages that its own loss needs besides
        """
        assert self.model_class is not None
        model_kwargs = {name: getattr(self, name) for name in shared_options(self.model_class, type(self))}
        own = {name: Follow(1 - decay) for name, decay in self.model_class.moving_averages(self).items()}
        return Network(GenerativeActor, {"model_class": self.model_class, "model_kwargs": model_kwargs}, {**targets, **own})

    def losses(self) -> Mapping[str, LossFn]:
        """
        :return: name of a network -> its loss on a batch, with scalars to log; in the order of the updates
        """
        raise NotImplementedError

    @property
    def cloning_network(self) -> str:
        """The network whose generative model clones the data: what held-out episodes are evaluated with."""
        return "actor"

    @property
    def policy_defaults(self) -> dict[str, Any]:
        """What the policy is told unless ``policy_kwargs`` say otherwise, where its own defaults don't suit the algorithm."""
        return {}

    @property
    def model_classes(self) -> dict[str, type[Any]]:
        """Entry of ``policy_kwargs`` -> class of the model whose arguments it holds."""
        return {} if self.model_class is None else {"model_kwargs": self.model_class}

    # construction

    def construct(self, values: dict[str, Any]) -> None:
        build = values["_init_setup_model"]
        env = values["env"]
        if not (env is None or isinstance(env, str)):
            check_environment(env)
        if isinstance(values["policy"], (gym.Env, VecEnv)):
            raise TypeError(f"policy: got an environment: write {type(self).__name__}('MlpPolicy', env).")
        if env is not None:
            env = maybe_make_env(env, values["verbose"])
            check_action_space(env.action_space)
            check_observation_space(env.observation_space, values["optimize_memory_usage"])
        declared = options_of(type(self))
        self.store({name: value for name, value in values.items() if not declared[name].sb3})
        accepted = inspect.signature(OffPolicyAlgorithm.__init__).parameters
        given = {name: value for name, value in values.items() if declared[name].sb3 and name in accepted}
        # SB3 adds to these dicts; the caller's stay as they are, and what becomes of those is not ours
        policy_kwargs = deepcopy(values["policy_kwargs"])
        if isinstance(policy_kwargs, dict) and policy_kwargs.get("use_sde") is False:
            del policy_kwargs["use_sde"]  # SAC's addition to a dict that it was given before
        given |= {"env": env, "replay_buffer_kwargs": copy(values["replay_buffer_kwargs"]), "policy_kwargs": policy_kwargs}
        super(Options, self).__init__(**given, sde_support=False, support_multi_env=True)
        # not in load(): the file's run takes its place
        self.run = Run(algorithm=self._own_class_name(), began_with_data=self.dataset is not None)
        self.data, self.resumption = self.data_class(self), Resumption()
        self.in_offline_phase, self.progress, self.memory = False, None, None
        self.take_defaults()
        self.check_options()
        # not in load(): what was saved was accepted once
        check_policy_kwargs(
            type(self), self.policy_class, self.policy_kwargs, self._own_arguments(), self.model_classes, build
        )
        if not build:
            return
        if not self._has_our_policy():
            ours = self.policy_aliases["MlpPolicy"].__name__
            raise TypeError(
                f"policy: {values['policy']!r} is none of {', '.join(self.policy_aliases)}, and no subclass of {ours}."
            )
        if env is None:
            self._take_spaces_from_dataset()
            check_action_space(self.action_space)
            check_observation_space(self.observation_space, self.optimize_memory_usage)
        self._setup_model()

    def take_defaults(self) -> None:
        """Set the options that are None until the others are known; ``load()`` puts the file's in their place."""

    @property
    def is_built(self) -> bool:
        return "policy" in vars(self)

    @property
    def n_updates(self) -> int:
        """Gradient steps taken so far, as logged under "train/n_updates"."""
        return self._n_updates

    @classmethod
    def explain_unknown(cls, name: str) -> str:
        return explain_unknown(cls, name)

    @classmethod
    def _own_class_name(cls) -> str:
        """Of this package's algorithm that it is, or of a user's."""
        ours = [c.__name__ for c in cls.__mro__ if c.__module__ == f"sb3_consistency.algorithms.{ALGORITHMS.get(c.__name__)}"]
        return ours[0] if ours else cls.__name__

    def _own_arguments(self) -> set[str]:
        """Arguments of the policy and its models that are this algorithm's."""
        takers = [self.policy_aliases["MlpPolicy"], *self.model_classes.values()]
        return {"networks", *(name for taker in takers for name in shared_options(taker, type(self)))}

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        check_environment(env)
        wrapped = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        check_vec_normalize(wrapped, unwrap_vec_normalize(wrapped))
        return wrapped

    def _has_our_policy(self) -> bool:
        return isinstance(self.policy_class, type) and issubclass(self.policy_class, self.policy_aliases["MlpPolicy"])

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            meant = did_you_mean(policy_name, self.policy_aliases)
            raise ValueError(f"policy: unknown {policy_name!r}{meant} known: {', '.join(self.policy_aliases)}.")
        return self.policy_aliases[policy_name]

    def _convert_train_freq(self) -> None:
        if isinstance(self.train_freq, list):  # as JSON and YAML have it
            self.train_freq = tuple(self.train_freq)
        super()._convert_train_freq()

    def check_together(self) -> None:
        super().check_together()
        if self.offline_only and self.pretrain_steps:
            raise ValueError(
                f"pretrain_steps must be 0, got {self.pretrain_steps}: {type(self).__name__} learns offline only, "
                "learn(n) takes n gradient steps on the dataset."
            )
        if self.has_windows:
            self._check_windows()
        # a user's load_dataset() may take more
        loaders = [inspect.signature(loader).parameters.values() for loader in (self.data_class.load, self.load_dataset)]
        known = {p.name for parameters in loaders for p in parameters if p.kind == p.KEYWORD_ONLY}
        check_keys("dataset_kwargs", self.dataset_kwargs or {}, known)

    def _check_windows(self) -> None:
        told = f"with horizon={self.horizon}, history={self.history}"
        if self.n_steps != 1:
            raise ValueError(
                f"n_steps must be 1 {told}, got {self.n_steps}: a critic of chunks learns from the returns of whole chunks."
            )
        buffer_class: Any = self.replay_buffer_class
        if buffer_class is not None and (buffer_class.sample, buffer_class._get_samples) not in KNOWN_SAMPLING:
            raise ValueError(
                f"replay_buffer_class can't be {buffer_class.__name__} {told}: windows of steps are drawn in place of its "
                f"sample(). Use one of {', '.join(buffer.__name__ for buffer in KNOWN_BUFFERS)}, or horizon=1, history=1."
            )

    def option_changed(self, name: str, value: Any) -> None:
        for module in self.policy.modules():
            if name in shared_options(type(module), type(self)):
                setattr(module, name, value)
        if name in ("dataset", "dataset_kwargs"):
            self.data.outdated = True
        elif name in ("compile", "precision"):
            if name == "precision":
                check_precision(self.precision, self.device)
            # of all others PyTorch's guards take care
            self.updater.forget()
            self._compile_choice()

    def _compile_choice(self) -> None:
        if hasattr(self.policy, "compile_choice"):
            self.policy.compile_choice(self.compile)

    def _setup_model(self) -> None:
        if not self._has_our_policy():
            theirs = f"{self.policy_class.__module__}.{self.policy_class.__qualname__}"
            raise ModelFileError(
                f"This is a model of another algorithm, with {theirs}: load it with that algorithm, not {type(self).__name__}."
            )
        if self.run.algorithm not in [base.__name__ for base in type(self).__mro__]:
            # networks alike would fit; the losses are not
            name = self.run.algorithm
            raise ModelFileError(f"This is a {name}: load it with {name}.load(), not {type(self).__name__}.")
        if self.replay_buffer_class in (ReplayBuffer, NStepReplayBuffer) and self.run.n_step_class_is_derived:
            # set by an earlier call and saved: SB3 would take it for the user's
            self.replay_buffer_class = None
            self.replay_buffer_kwargs = {k: v for k, v in self.replay_buffer_kwargs.items() if k not in ("n_steps", "gamma")}
        self.run.n_step_class_is_derived = self.replay_buffer_class is None
        # again, because load() has set what it is given since
        self.take_defaults()
        self.check_options()
        check_precision(self.precision, self.device)
        user_kwargs = self.policy_kwargs
        shared = shared_options(self.policy_aliases["MlpPolicy"], type(self))
        # the caller's (and the saved) policy_kwargs stay as they were given
        self.policy_kwargs = {
            "networks": {name: network.structure() for name, network in self.networks().items()},
            **{name: getattr(self, name) for name in shared},
            **self.policy_defaults,
            **user_kwargs,
        }
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = user_kwargs
        for name in self.policy.network_names():
            setattr(self, name, getattr(self.policy, name))
        self.updater = Updater(self.policy, self)
        self._compile_choice()

    # data

    @classmethod
    def from_dataset(
        cls, dataset: Any, policy: str | type[Any] | None = None, *, eval_env: bool = True, env: Any = None, **kwargs: Any
    ) -> "Self":
        """
        Build a model for a dataset: environment, policy and data come from it.

        Algorithms that learn offline only have no environment where the dataset names none.

        :param dataset: as for :meth:`load_dataset`
        :param policy: policy; None for the one that fits the observations
        :param eval_env: use the environment meant for evaluation (some collection environments never truncate)
        :param env: an environment of your own instead
        :param kwargs: further arguments of the algorithm; ``dataset_kwargs`` go to :meth:`load_dataset`
        :return: model with the data loaded
        :raises DatasetError: if the dataset can't be used or its environment can't be made
        """
        sources = open_datasets(dataset)
        if env is None and not (cls.offline_only and sources[0].env_spec is None):
            env = sources[0].make_env(eval_env=eval_env)
        if not (env is None or isinstance(env, VecEnv)):
            env = flatten_if_nested(gym.make(env) if isinstance(env, str) else env)
        if policy is None:
            policy = fitting_policy(dataset_spaces(sources[0])[0] if env is None else env.observation_space)
        model: Any = cls(policy, env, dataset=dataset, **kwargs)
        model.data.of_constructor = True  # from the sources that are open already
        model.load_dataset(sources, **(model.dataset_kwargs or {}))
        return model

    def load_dataset(
        self,
        dataset: Any,
        *,
        weights: Sequence[float] | None = None,
        episodes: slice | Iterable[int] | None = None,
        top_fraction: float = 1.0,
        heldout_fraction: float = 0.0,
        reward_transform: str | RewardFunction = "none",
        progress_bar: bool = False,
        **unknown: Never,
    ) -> int:
        """
        Fill the replay buffer with a dataset, in place of what an earlier call loaded.

        Scales and clips actions to [-1, 1], keeps time-outs apart from terminations, fits the policy's observation
        statistics (and VecNormalize's) unless the model has been trained, and applies the reward transform. Nothing
        changes if anything is wrong with the data.

        :param dataset: a Minari id (local, else downloaded), a ``minari.MinariDataset``, a mapping (or ``.npz``
            file) of arrays ``observations, actions, rewards, terminations`` and more, a pandas DataFrame, an SB3
            ``ReplayBuffer`` or a file that ``save_replay_buffer`` wrote, a file or folder of D4RL, OGBench, robomimic,
            LeRobot, d3rlpy, imitation, Diffusion Policy or rl-zoo3, or a list of these: see "Bring your own data" in the docs
        :param weights: shares in which batches draw from a list of datasets (they need not sum to 1);
            None draws every transition with the same probability
        :param episodes: a slice of the episodes (of each dataset), or their numbers
        :param top_fraction: load only this share of the episodes, those with the highest returns, in (0, 1]
        :param heldout_fraction: keep this share of the episodes (evenly spaced) out of training; their
            behaviour-cloning loss is logged as ``eval/heldout_bc_loss``
        :param reward_transform: "none", "normalize", "antmaze", "minus_one", "iql_locomotion" or a function of an
            array of rewards; applied to online rewards too
        :param progress_bar: show a progress bar
        :return: number of transitions loaded
        :raises DatasetError: if the dataset can't be found, read or used
        :raises ValueError: if another argument is wrong
        :raises TypeError: if one is unknown
        """
        check_keys("load_dataset()", unknown, inspect.signature(self.data.load).parameters)
        return self.data.load(
            dataset,
            weights=weights,
            episodes=episodes,
            top_fraction=top_fraction,
            heldout_fraction=heldout_fraction,
            reward_transform=reward_transform,
            progress_bar=progress_bar,
        )

    @property
    def needs_rewards(self) -> bool:
        """Whether anything is learned from rewards: data without them is refused then."""
        return "critic" in self.networks()

    @property
    def offline_buffer(self) -> ReplayBuffer | None:
        """The offline data, once online training has a buffer of its own."""
        return self.data.separate

    @property
    def reference_returns(self) -> tuple[float, float] | None:
        """Returns of a random policy and of an expert, where the data tells them: normalized scores are made of them."""
        return self.run.reference_returns

    @reference_returns.setter
    def reference_returns(self, value: tuple[float, float] | None) -> None:
        self.run.reference_returns = value

    def new_buffer(self, size: int) -> ReplayBuffer:
        """
        :param size: number of transitions that it has room for
        :return: an empty buffer of the model's class
        :raises ValueError: if it asks the environment for rewards, and there is none
        """
        assert self.replay_buffer_class is not None
        kwargs = dict(self.replay_buffer_kwargs)
        if issubclass(self.replay_buffer_class, HerReplayBuffer):
            if self.env is None:
                raise ValueError("HerReplayBuffer needs an environment to compute rewards: pass env=...")
            kwargs["env"] = self.env
        return self.replay_buffer_class(
            size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **kwargs,
        )

    def _take_spaces_from_dataset(self) -> None:
        if self.dataset is None:
            raise ValueError(
                f"env is None: pass an environment, or dataset=... to train offline "
                f"({type(self).__name__}.from_dataset('<Minari id>') does both)."
            )
        source = open_datasets(self.dataset)[0]
        self.observation_space, self.action_space = dataset_spaces(source)
        self.run.inferred_spaces = list(source.inferred)
        wanted = self.policy_aliases["MultiInputPolicy"]
        if isinstance(self.observation_space, spaces.Dict) and self.policy_class is not wanted:
            raise ValueError("policy: use 'MultiInputPolicy' for a dataset with Dict observations.")
        self.n_envs = 1

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Set the environment, as SB3 does. Its spaces take the place of those that were inferred from arrays.

        :param env: the environment, or its id
        :param force_reset: whether to reset it before training
        :raises ValueError: if its spaces are not the model's
        """
        env = self._wrap_env(maybe_make_env(env, self.verbose), self.verbose)
        before = {name: getattr(self, name) for name in self.run.inferred_spaces}
        self._replace_spaces(adopted_spaces(before, env))
        try:
            super().set_env(env, force_reset)
        except BaseException:
            self._replace_spaces(before)
            raise
        self.run.inferred_spaces = []

    def _replace_spaces(self, new: dict[str, spaces.Space]) -> None:
        for name, space in new.items():
            old = getattr(self, name)
            for holder in (self, *self.policy.modules()):
                if getattr(holder, name, None) is old:
                    setattr(holder, name, space)

    def get_env(self) -> VecEnv | None:
        """
        :return: the environment; without one, in an offline phase, a stand-in with its spaces, which callbacks ask for
        """
        if self.env is None and self.in_offline_phase:
            return DummyVecEnv([lambda: SpacesOnlyEnv(self.observation_space, self.action_space)])
        return super().get_env()

    # the phases

    def learn(
        self,
        total_timesteps: int = 1_000_000,
        callback: MaybeCallback = None,
        log_interval: int | None = -1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> "Self":
        """
        Train: first on the constructor's ``dataset`` for ``pretrain_steps`` (once), then online as SB3 does.

        Timesteps start anew after the offline phase: a checkpoint callback passed here names the files of both phases
        alike; to keep both, call ``pretrain(..., callback=...)`` with a callback of its own.

        Algorithms that learn offline only take ``total_timesteps`` gradient steps on the dataset instead.

        :param total_timesteps: environment steps, or gradient steps of an offline algorithm
        :param callback: callback(s), called in the offline phase too
        :param log_interval: episodes or offline gradient steps between two logs; -1 for 4 or 1000, None for no logs
        :param tb_log_name: name of the TensorBoard run; None for the name of the class
        :param reset_num_timesteps: whether to start counting at 0
        :param progress_bar: show progress bars
        :return: the model
        :raises DatasetError: if the dataset can't be used, or an offline algorithm has none
        :raises ValueError: if there is no environment to collect experience in, or the number of steps is negative
        :raises TypeError: if the number of steps is not whole
        """
        total_timesteps = as_count("total_timesteps", total_timesteps)
        if log_interval not in (-1, None):
            log_interval = as_count("log_interval", log_interval, 1)
        name = tb_log_name or type(self).__name__
        arguments = {"total_timesteps": total_timesteps, "log_interval": log_interval, "tb_log_name": tb_log_name}
        self.run.call = ("learn", {**arguments, "reset_num_timesteps": reset_num_timesteps})
        continued = self.continued_phase
        if continued is None:
            self.restore_online_timesteps()
        self.data.load_of_constructor()
        if log_interval == -1:
            log_interval = 1000 if self.offline_only else 4
        if self.offline_only:
            self.num_timesteps = 0 if reset_num_timesteps and continued is None else self.num_timesteps
            learn_offline(self, total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)
            return self
        if self.env is None and total_timesteps > 0:
            raise ValueError("env: learn() collects experience; call set_env(...) first, or pretrain(...) instead.")
        if self.pretrain_steps and self.run.pretrain_start is None:
            self.run.pretrain_start = self._n_updates
        # a model loaded from a checkpoint of its pretraining takes the steps that are left
        remaining = self._pretraining_left()
        interval = None if log_interval is None else 1000  # a number is one of episodes here
        if (remaining > 0 or continued == "offline") and not pretrain(
            self, remaining, callback, interval, f"{name}_pretrain", progress_bar
        ):
            return self
        if self.env is None or (total_timesteps == 0 and self.run.was_pretrained):
            return self
        self.data.begin_online()
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)  # type: ignore[arg-type]

    def pretrain(
        self,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str | None = None,
        progress_bar: bool = False,
    ) -> "Self":
        """
        Train on the loaded dataset without touching an environment; after going online on the experience of it, too, in the
        shares of ``offline_fraction``.

        SB3 callbacks work as in :meth:`learn`: ``on_step`` is called once per gradient step, ``on_rollout_start`` and
        ``on_rollout_end`` around every chunk of 64, whose batches are drawn together. Inside,
        ``num_timesteps`` counts the model's gradient steps, so that checkpoints and TensorBoard points get
        names of their own; it is restored at the end.

        :param gradient_steps: number of gradient steps
        :param callback: callback(s), called after every gradient step
        :param log_interval: gradient steps between two logs; None to leave them to a callback, as SB3 does
        :param tb_log_name: name of the TensorBoard run; None for the class's name + "_pretrain"
        :param progress_bar: show a progress bar
        :return: the model
        :raises DatasetError: if no dataset was loaded
        :raises TypeError: if the number of steps is not whole
        :raises ValueError: if it is negative
        """
        gradient_steps = as_count("gradient_steps", gradient_steps)
        log_interval = None if log_interval is None else as_count("log_interval", log_interval, 1)
        arguments = {"gradient_steps": gradient_steps, "log_interval": log_interval, "tb_log_name": tb_log_name}
        self.run.call = ("pretrain", arguments)
        pretrain(self, gradient_steps, callback, log_interval, tb_log_name, progress_bar)
        return self

    @property
    def is_pretrained(self) -> bool:
        """Whether ``learn()`` has none of the constructor's ``pretrain_steps`` left to take."""
        return self._pretraining_left() <= 0

    def _pretraining_left(self) -> int:
        return (self.run.pretrain_start or 0) + self.pretrain_steps - self._n_updates if self.pretrain_steps else 0

    def restore_online_timesteps(self) -> None:
        """Count environment steps again, after an offline phase that counted gradient steps."""
        if self.run.online_timesteps is not None:
            self.num_timesteps, self.run.online_timesteps = self.run.online_timesteps, None

    @property
    def learning_starts(self) -> int:
        """Steps of random warm-up; 0 after an offline phase, which a random warm-up would only dilute."""
        return 0 if self.run.was_pretrained else int(self.__dict__["learning_starts"])

    @learning_starts.setter
    def learning_starts(self, value: int) -> None:
        self.__dict__["learning_starts"] = value

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self.run.in_vec_normalize |= self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs
        if self.continued_phase is not None:
            return self.resumption.setup_learn(self, callback, tb_log_name, progress_bar)
        if reset_num_timesteps or self._last_obs is None:
            # the environment starts anew: what was running is cut off
            self.memory = None
            if self.replay_buffer is not None and not self.data.in_replay:
                truncate_last_episodes(self.replay_buffer)
        if isinstance(self.action_noise, VectorizedActionNoise) and self.action_noise.n_envs != self.n_envs:
            self.action_noise = self.action_noise.base_noise  # SB3 makes as many as there are environments
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        policy = self.policy
        if not policy.remembers:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None
        obs, _ = policy.obs_to_tensor(self._last_obs)
        if self.num_timesteps < learning_starts:
            # at random, as SB3 does; what is seen is remembered
            self.memory = policy.observe(obs, self.memory, self._last_episode_starts)
            chosen = np.array([self.action_space.sample() for _ in range(n_envs)])
        else:
            chosen, self.memory = policy.act(obs, self.memory, self._last_episode_starts, deterministic=False)
        scaled = policy.scale_action(chosen)
        if action_noise is not None:
            scaled = np.clip(scaled + action_noise(), -1, 1)
        return policy.unscale_action(scaled), scaled

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> Any:
        """
        Collect experience; see SB3.

        :return: how much there is
        """
        self.enter_loop()
        try:
            rollout = super().collect_rollouts(*args, **kwargs)
        except BaseException:
            self._last_obs = None  # a step may have been taken that is not stored: begin anew
            raise
        if not rollout.continue_training:
            self._last_obs = None  # as SB3 stops before it stores the step
        return rollout

    def _store_transition(
        self, replay_buffer: ReplayBuffer, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        row = replay_buffer.pos
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._last_episode_starts = np.asarray(dones, bool)
        if self.run.reward_function is not None:
            # on the stored reward: VecNormalize hands on the original one
            replay_buffer.rewards[row] = self.run.reward_function(replay_buffer.rewards[row])

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._logger = with_scores(self._logger, self.run.reference_returns)
        if not self.compile and self._gradient_steps_ahead() >= COMPILING_PAYS and can_compile(self.device):
            self.logger.info("This run is long enough for compile=True to save time: the same losses, compiled at the start.")
        callbacks = super()._init_callback(callback, False)
        if progress_bar:
            phase = "Pretraining" if self.in_offline_phase else "Training"
            callbacks = CallbackList([callbacks, PhaseProgress(phase)])
            callbacks.init_callback(self)
        return self.resumption.init_callback(self, callbacks)

    def _gradient_steps_ahead(self) -> int:
        n_steps, every = self._total_timesteps - self.num_timesteps, self.train_freq
        if self.in_offline_phase:
            return n_steps
        assert isinstance(every, TrainFreq)
        return gradient_steps_online(n_steps, every.frequency, every.unit.value, self.gradient_steps, self.n_envs)

    def plan(self, observation: Any, *, deterministic: bool = False) -> np.ndarray:
        """
        Choose a chunk of ``horizon`` actions, as if the observation were an episode's first.

        :param observation: one observation or a batch of them
        :param deterministic: from the fixed noise
        :return: actions in the environment's units, (H, *action shape); with a batch in front
        """
        plan: np.ndarray = self.policy.plan(observation, deterministic)
        return plan

    # gradient steps

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Take gradient steps; see SB3.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions of each
        """
        if not self._ready_to_train():
            return
        self.update_learning_rates()
        means = RunningMeans()
        for batch in self.batches(gradient_steps, batch_size):
            means.add(self.gradient_step(batch))
        self.log_metrics(means)

    def _ready_to_train(self) -> bool:
        """After an offline phase whose data is gone (it is not saved with a model), experience must gather first."""
        if self.data.buffer is not None or not self.run.was_pretrained or self.replay_buffer is None:
            return self.data.can_sample(self.replay_buffer) or self.data.can_sample(self.data.separate)
        wanted = min(self.__dict__["learning_starts"] // self.n_envs, self.replay_buffer.buffer_size)
        return self.data.can_sample(self.replay_buffer) and self.replay_buffer.size() >= wanted

    def batches(self, n_batches: int, batch_size: int) -> Iterator[Any]:
        """
        Sample several batches at once: the buffer's fixed cost per call is larger than its cost per row.

        :param n_batches: number of batches
        :param batch_size: rows of each
        :return: the batches
        """
        at_once = min(n_batches, CHUNK)
        if at_once > 1:
            buffers = [buffer for buffer in (self.replay_buffer, self.data.separate) if buffer is not None]
            row = self.history * bytes_per_transition(self.observation_space)
            at_once = min(at_once, max(1, CHUNK_BYTES // (batch_size * row)))
            # a user's own may give meaning to the size of what is drawn together
            at_once = at_once if all(map(samples_as_sb3, buffers)) else 1
        for start in range(0, n_batches, at_once):
            yield from self.data.sample(min(at_once, n_batches - start), batch_size)

    def gradient_step(self, batch: Any) -> TensorDict:
        """
        :param batch: transitions
        :return: scalars to log
        """
        # predict() of the policy, or of a network alone, switches it off
        self.policy.set_training_mode(True)
        self.prepare_step()
        metrics = self.updater.step(self.losses(), self.networks(), batch, self._n_updates + 1)
        self._n_updates += 1
        return metrics

    def prepare_step(self) -> None:
        """Set what changes from step to step, as tensors: a compiled loss takes numbers for constants."""
        end = self.curriculum_steps or self.run.curriculum_end
        self.progress = th.full((), min(1.0, self._n_updates / end), device=self.device) if end else None

    def update_learning_rates(self) -> None:
        """Set the optimizers' learning rates for the present progress, and record them."""
        progress = self._current_progress_remaining
        decay = self.cosine_decay(1 - progress)
        rate, actor_rate = decay * self.lr_schedule(progress), decay * self.actor_rate(progress)
        for name in self.policy.trained_networks():
            network = getattr(self.policy, name)
            update_learning_rate(network.optimizer, actor_rate if isinstance(network, GenerativeActor) else rate)
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/actor_learning_rate", actor_rate)

    def actor_rate(self, progress: float) -> float:
        """
        :param progress: progress remaining, from 1 to 0
        :return: learning rate of the actor, without its decay
        """
        rate = self.actor_learning_rate
        return float(self.lr_schedule(progress) if rate is None else FloatSchedule(rate)(progress))

    def cosine_decay(self, progress: float) -> float:
        """
        :param progress: share of the run that is done
        :return: factor of the learning rates
        """
        decays = self.in_offline_phase if self.cosine_lr_decay is None else self.cosine_lr_decay
        return 0.5 * (1 + math.cos(math.pi * progress)) if decays else 1.0

    def check_divergence(self) -> None:
        """
        :raises DivergenceError: if a loss was not finite since the last look, and ``on_divergence`` is "stop"
        """
        last = self.last_checkpoint
        self.updater.check(self._n_updates, f" The last checkpoint is {last}." if last else "")

    def log_metrics(self, means: RunningMeans) -> None:
        """
        :param means: of the scalars to log
        """
        self.check_divergence()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, mean in means.read().items():
            self.logger.record(f"train/{name}", mean)

    # a killed run goes on

    @classmethod
    def load_latest(cls, folder: str | os.PathLike[str], env: Any = None, device: Any = "auto", **kwargs: Any) -> "Self":
        """
        Load the newest intact checkpoint of a folder, to :meth:`resume` from; a broken one is named in a warning.

        Like SB3's files, checkpoints hold pickles: load only those you trust.

        :param folder: folder that a :class:`ResumableCheckpointCallback` writes to
        :param env: environment, made and wrapped as the interrupted run's; its state is put back
        :param device: device to continue on
        :param kwargs: as for :meth:`load`; with changed hyperparameters the run is no longer the uninterrupted one
        :return: the model
        :raises CheckpointError: if there is no intact checkpoint, it is another class's, or ``env`` is made differently
        :raises ValueError: if ``buffer_size`` is given: the run goes on with the buffer that it has
        """
        from sb3_consistency.resume.callback import load_checkpoint
        from sb3_consistency.resume.folder import latest_checkpoint

        return load_checkpoint(cls, latest_checkpoint(folder), env, device, **kwargs)

    def resume(self, callback: MaybeCallback = None, progress_bar: bool = False) -> "Self":
        """
        Continue the call of :meth:`learn` or :meth:`pretrain` that was interrupted, with its arguments, to its end.

        :param callback: callback(s), given anew; the counters of SB3's continue
        :param progress_bar: show a progress bar
        :return: the model
        :raises ValueError: if the model does not come from :meth:`load_latest`, or has no environment to go on in
        """
        self.resumption.resume(self, callback, progress_bar)
        return self

    @property
    def interrupted_phase(self) -> str | None:
        """Phase that :meth:`resume` continues: "offline", "online", or None if there is no interrupted run."""
        return self.resumption.interrupted_phase

    @property
    def continued_phase(self) -> str | None:
        """Phase that is about to be continued, if one is."""
        return self.resumption.continued_phase

    @property
    def last_checkpoint(self) -> str | None:
        """Path of the newest checkpoint of this run."""
        return self.resumption.last_checkpoint

    def enter_loop(self) -> None:
        """The last moment before a loop goes on: whatever was set up since has left its trace in the random states."""
        if self.continued_phase is not None:
            self.resumption.enter_loop(self)

    # saving and loading

    def export(self, path: str | pathlib.Path, deterministic: bool = True, normalized_input: bool = False) -> pathlib.Path:
        """Write the actor as ONNX, ``torch.export`` or TorchScript; see :func:`sb3_consistency.files.export.export_policy`."""
        from sb3_consistency.files.export import export_policy

        return export_policy(self, path, deterministic, normalized_input)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip file; see SB3.

        :param path: file to write
        :param exclude: names of attributes to leave out besides
        :param include: names of attributes to save all the same
        """
        self.take_policy_options()
        super().save(path, exclude, include)

    def take_policy_options(self) -> None:
        """Put into ``policy_kwargs`` what was changed on the policy: a file builds its policy from them."""
        own = self._own_arguments()
        declared = {n: o for n, o in options_of(type(self.policy)).items() if not (o.fixed or o.sb3 or n in own)}
        told = {**{name: o.default for name, o in declared.items()}, **self.policy_defaults, **self.policy_kwargs}
        present = {name: getattr(self.policy, o.attribute) for name, o in declared.items()}
        changed = {name: x for name, x in present.items() if x != told[name]}
        self.policy_kwargs = {**self.policy_kwargs, **changed}

    def save_safe(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write the model as plain data, read without executing anything; see :func:`sb3_consistency.files.safe.save_safe`."""
        from sb3_consistency.files.safe import save_safe

        return save_safe(self, path)

    @classmethod
    def load_safe(cls, path: str | pathlib.Path, env: GymEnv | str | None = None, device: th.device | str = "auto") -> "Self":
        """Load a file of :meth:`save_safe`; see :func:`sb3_consistency.files.safe.load_safe`."""
        from sb3_consistency.files.safe import load_safe_as

        return load_safe_as(cls, path, env, device)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer, as SB3 does: online experience, or after an offline phase alone its data.

        :param path: file to write; one that ends in ".safetensors" holds numbers and text alone, any other is a pickle
        :raises ValueError: if there is no replay buffer, or it holds what a safe file can't
        """
        if is_safe_path(path):
            if self.replay_buffer is None:
                raise ValueError("The replay buffer is not defined: there is nothing to save.")
            segments = {"offline_segments": [list(segment) for segment in self.data.segments]} if self.data.in_replay else {}
            save_buffer(self.replay_buffer, path, **segments)
            return
        content = vars(self.replay_buffer) if self.data.in_replay else {}
        # in the file only: load_replay_buffer() shall know what it reads
        content["offline_segments"] = [tuple(segment) for segment in self.data.segments]
        try:
            super().save_replay_buffer(path)
        finally:
            del content["offline_segments"]
        wrote_pickle(str(path))

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a buffer of online experience, as SB3 does; offline data loaded before stays, unless ``keep_offline`` is off.

        :param path: file that ``save_replay_buffer`` wrote; offline data that it wrote takes the place of what is loaded. A
            pickle runs the code in it, and is warned of; one that ends in ".safetensors" executes nothing
        :param truncate_last_traj: for HER, whether the last trajectory in the buffer was finished
        :raises DatasetError: if the file is damaged, or of another number of environments; then nothing has changed
        """
        if not is_safe_path(path):
            where = path if isinstance(path, (str, os.PathLike)) else getattr(path, "name", "the file")
            warn_of_pickle(str(where), "save_replay_buffer({})")
        try:
            with self.data.kept_on_error():
                self.data.begin_online()
                if is_safe_path(path):
                    self.replay_buffer = load_buffer(path, self.new_buffer, truncate_last_traj)
                else:
                    super().load_replay_buffer(path, truncate_last_traj)
                n_envs = self.replay_buffer.n_envs  # type: ignore[union-attr]
                if n_envs != self.n_envs:
                    raise DatasetError(
                        f"{path}: a buffer of {n_envs} environment(s), the model has {self.n_envs}: load it into a model with "
                        f"{n_envs}, or as a dataset (load_dataset({str(path)!r}))."
                    )
                segments = vars(self.replay_buffer).pop("offline_segments", None)
                if segments is not None:
                    self.data.take_segments(segments)
        except (FileNotFoundError, DatasetError):
            raise
        except Exception as error:  # unpickling damaged bytes may raise anything
            raise DatasetError(f"{path}: damaged, or not a file of save_replay_buffer(): {error!r}.") from error

    def _excluded_save_params(self) -> list[str]:
        parts = ["data", "updater", "resumption", "progress", "in_offline_phase", "memory"]
        by_name = isinstance(self.dataset, str) or (
            isinstance(self.dataset, (list, tuple)) and all(isinstance(d, str) for d in self.dataset)
        )
        others = [*self.policy.network_names(), *([] if by_name else ["dataset"])]
        return [*super()._excluded_save_params(), *parts, *others]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"{name}.optimizer" for name in self.policy.trained_networks())], []

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Set weights and optimizer states, as SB3 does; where they don't fit, nothing changes.

        :param load_path_or_dict: file of :meth:`save`, or what :meth:`get_parameters` returned
        :param exact_match: whether every weight must be given
        :param device: device to load to
        :raises ValueError: if the names don't fit
        :raises RuntimeError: if the shapes don't fit
        """
        before: Any = deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except Exception:
            super().set_parameters(before)
            raise

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> "Self":
        """
        Load a model; see SB3's ``BaseAlgorithm.load``.

        :param path: file that :meth:`save` wrote
        :param env: environment to train in, or its id
        :param device: where networks live
        :param custom_objects: objects that take the place of those in the file, by name
        :param print_system_info: print the versions that the file was written with, and those of now
        :param force_reset: whether to reset the environment before training
        :param kwargs: constructor arguments to change
        :return: the model
        :raises TypeError: if a name in ``kwargs`` is none of them (SB3 would set it and ignore it)
        :raises ValueError: if an argument is out of its range, or would make other networks
        :raises ModelFileError: if the file is damaged, or holds another algorithm's model
        """
        # a file has its policy
        unknown = kwargs.keys() - (argument_names(cls) - {"policy", "_init_setup_model"})
        if unknown:
            raise TypeError(f"{cls.__name__}.load() got unexpected arguments {sorted(unknown)}.")
        if env is not None:
            env = cls._wrap_env(maybe_make_env(env, 0), 0)
        if "stats_window_size" in kwargs:  # SB3 keeps it under another name
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        of_sb3: dict[str, Any] = {
            "custom_objects": custom_objects,
            "print_system_info": print_system_info,
            "force_reset": force_reset,
        }
        if device != "auto":  # what is not given is not told of in messages
            of_sb3["device"] = device
        return load_model(super().load, path, env, cls, {**of_sb3, **kwargs})
