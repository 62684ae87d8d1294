"""What all generative algorithms share: construction, ``learn``, saving and loading."""

import inspect
import io
import pathlib
from copy import copy, deepcopy
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import FloatSchedule

from sb3_consistency.data.checks import as_count
from sb3_consistency.envs.spaces import check_action_space, check_observation_space
from sb3_consistency.files.zip import ModelFileError, load_model
from sb3_consistency.options import check_shared
from sb3_consistency.policies.policy import CnnPolicy, GenerativePolicy, MlpPolicy, MultiInputPolicy
from sb3_consistency.resume.callback import ResumableTraining
from sb3_consistency.training.gradient import check_precision
from sb3_consistency.training.scores import with_scores
from sb3_consistency.unknown import argument_names, check_keys, check_policy_kwargs, did_you_mean, reject_unknown


class GenerativeAlgorithm(ResumableTraining):
    """
    Base of the generative algorithms. See :class:`~sb3_consistency.options.SharedArguments`.

    Subclasses set their own attributes, then call this constructor, and supply :meth:`losses`.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class
    :param env: environment or its id; None to train offline only
    :param learning_rate: learning rate of all networks, or a schedule of the progress remaining (from 1 to 0)
    :raises ValueError: if an argument is out of its range
    :raises UnsupportedSpaceError: if the action space is not a bounded Box
    :raises TypeError: if an argument is unknown
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    #: whether :meth:`predict` works already (a staged planner's does so late)
    can_act: bool = True
    _n_step_class_is_derived = False
    #: whether :meth:`learn` takes gradient steps on a dataset instead of collecting experience
    offline_only: ClassVar[bool] = False

    def __init__(
        self,
        policy: str | type[GenerativePolicy],
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        *,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        target_update_interval: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        actor_learning_rate: float | Schedule | None = None,
        cosine_lr_decay: bool | None = None,
        max_grad_norm: float | None = None,
        curriculum_steps: int | None = None,
        dataset: Any = None,
        dataset_kwargs: dict[str, Any] | None = None,
        pretrain_steps: int = 0,
        offline_fraction: float | Schedule | None = None,
        keep_offline: bool = True,
        normalize_observations: bool = True,
        compile: bool = False,
        precision: str = "float32",
        on_divergence: str = "stop",
        _init_setup_model: bool = True,
        **unknown: Any,
    ) -> None:
        reject_unknown(type(self), unknown)
        if env is not None:
            env = maybe_make_env(env, verbose)
            check_action_space(env.action_space)
            check_observation_space(env.observation_space, optimize_memory_usage)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            # SB3 adds to this dict; the caller's stays as it is
            replay_buffer_kwargs=copy(replay_buffer_kwargs),
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.target_update_interval = target_update_interval
        self.actor_learning_rate = actor_learning_rate
        self.cosine_lr_decay = cosine_lr_decay
        self.max_grad_norm = max_grad_norm
        self.curriculum_steps = curriculum_steps
        self.dataset = dataset
        self.dataset_kwargs = dataset_kwargs
        self.pretrain_steps = pretrain_steps
        self.offline_fraction = offline_fraction
        self.keep_offline = keep_offline
        self.normalize_observations = normalize_observations
        self.compile = compile
        self.precision = precision
        self.on_divergence = on_divergence
        # saved with the model: SB3's load() would put one algorithm's attributes into another
        self._saved_as = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith(__package__.partition(".")[0]))
        self._init_offline()
        self._check_arguments()
        # not in load(): what was saved was accepted once
        options, models = self.policy_options(), self._model_classes()
        check_policy_kwargs(type(self), self.policy_class, self.policy_kwargs, options, models, _init_setup_model)
        if _init_setup_model and not self._has_our_policy():
            ours = self.policy_aliases["MlpPolicy"].__name__
            raise TypeError(f"policy: {policy!r} is none of {', '.join(self.policy_aliases)}, and no subclass of {ours}.")
        if env is None and _init_setup_model:
            self._take_spaces_from_dataset()
            check_action_space(self.action_space)
            check_observation_space(self.observation_space, optimize_memory_usage)
        if _init_setup_model:
            self._setup_model()

    def policy_options(self) -> dict[str, Any]:
        """
        :return: what this algorithm needs from the policy, as its constructor arguments
        """
        return {"target_networks": (), "model_kwargs": {}}

    def _model_classes(self) -> dict[str, type[Any]]:
        """Entry of ``policy_kwargs`` -> class of the model whose arguments it holds."""
        options = self.policy_options()
        return {"model_kwargs": options["model_class"]} if "model_class" in options else {}

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

    def _check_arguments(self) -> None:
        """Check the arguments that were stored; subclasses add theirs."""
        check_shared({**vars(self), "stats_window_size": self._stats_window_size})
        if self.offline_only and self.pretrain_steps:
            raise ValueError(
                f"pretrain_steps must be 0, got {self.pretrain_steps}: {type(self).__name__} learns offline only, "
                "learn(n) takes n gradient steps on the dataset."
            )
        check_keys(
            "dataset_kwargs", self.dataset_kwargs or {}, inspect.signature(self.load_dataset).parameters.keys() - {"dataset"}
        )

    def _setup_model(self) -> None:
        if not self._has_our_policy():
            theirs = f"{self.policy_class.__module__}.{self.policy_class.__qualname__}"
            raise ModelFileError(
                f"This is a model of another algorithm, with {theirs}: load it with that algorithm, not {type(self).__name__}."
            )
        if self._saved_as not in [base.__name__ for base in type(self).__mro__]:
            # networks alike would fit; the losses are not
            raise ModelFileError(
                f"This is a {self._saved_as}: load it with {self._saved_as}.load(), not {type(self).__name__}."
            )
        # again, because load() has set what it is given since
        self._check_arguments()
        check_precision(self.precision, self.device)
        if self.replay_buffer_class is NStepReplayBuffer and self._n_step_class_is_derived:
            # set by an earlier call and saved: SB3 would take it for the user's
            self.replay_buffer_class = None
            self.replay_buffer_kwargs = {k: v for k, v in self.replay_buffer_kwargs.items() if k not in ("n_steps", "gamma")}
        self._n_step_class_is_derived = self.replay_buffer_class is None
        user_kwargs, options = self.policy_kwargs, self.policy_options()
        # the caller's (and the saved) policy_kwargs stay as they were given
        model_kwargs = {**options["model_kwargs"], **user_kwargs.get("model_kwargs", {})}
        self.policy_kwargs = {**options, **user_kwargs, "model_kwargs": model_kwargs}
        try:
            super()._setup_model()
        finally:
            self.policy_kwargs = user_kwargs
        for name in self.policy.network_names():
            setattr(self, name, getattr(self.policy, name))
        self._collect_parameters()

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rate = self.actor_learning_rate
        self.actor_lr_schedule = None if rate is None else FloatSchedule(rate)

    def learn(
        self,
        total_timesteps: int = 1_000_000,
        callback: MaybeCallback = None,
        log_interval: int | None = -1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Any:
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
        name = tb_log_name or type(self).__name__
        arguments = {"total_timesteps": total_timesteps, "log_interval": log_interval, "tb_log_name": tb_log_name}
        self._call = ("learn", {**arguments, "reset_num_timesteps": reset_num_timesteps})
        continued = self._continued_phase
        if continued is None:
            self._restore_online_timesteps()
        self._load_constructor_dataset()
        if log_interval == -1:
            log_interval = 1000 if self.offline_only else 4
        if self.offline_only:
            self.num_timesteps = 0 if reset_num_timesteps and continued is None else self.num_timesteps
            self._learn_offline(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)
            return self
        if self.env is None and total_timesteps > 0:
            raise ValueError("env: learn() collects experience; call set_env(...) first, or pretrain(...) instead.")
        if self.pretrain_steps and self._pretrain_start is None:
            self._pretrain_start = self._n_updates
        # a model loaded from a checkpoint of its pretraining takes the steps that are left
        remaining = self._pretraining_left()
        pretraining = remaining > 0 or continued == "offline"
        interval = None if log_interval is None else 1000  # a number is one of episodes here
        if pretraining and not self._pretrain(remaining, callback, interval, f"{name}_pretrain", progress_bar):
            return self
        if self.env is None or (total_timesteps == 0 and self._was_pretrained):
            return self
        self._begin_online()
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)  # type: ignore[arg-type]

    @property
    def learning_starts(self) -> int:
        """Steps of random warm-up; 0 after an offline phase, which a random warm-up would only dilute."""
        return 0 if self._was_pretrained else int(self.__dict__["learning_starts"])

    @learning_starts.setter
    def learning_starts(self, value: int) -> None:
        self.__dict__["learning_starts"] = value

    _was_pretrained = False

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        self._logger: Logger = with_scores(self._logger, self._reference_returns)
        return super()._init_callback(callback, progress_bar)

    def export(self, path: str | pathlib.Path, deterministic: bool = True) -> pathlib.Path:
        """Write the actor as ONNX, ``torch.export`` or TorchScript; see :func:`sb3_consistency.files.export.export_policy`."""
        from sb3_consistency.files.export import export_policy

        return export_policy(self, path, deterministic)

    def save_safe(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write the model as plain data, read without executing anything; see :func:`sb3_consistency.files.safe.save_safe`."""
        from sb3_consistency.files.safe import save_safe

        return save_safe(self, path)

    @classmethod
    def load_safe(cls, path: str | pathlib.Path, env: GymEnv | str | None = None, device: th.device | str = "auto") -> Any:
        """Load a file of :meth:`save_safe`; see :func:`sb3_consistency.files.safe.load_safe`."""
        from sb3_consistency.files.safe import load_safe_as

        return load_safe_as(cls, path, env, device)

    def _excluded_save_params(self) -> list[str]:
        networks = self.policy.network_names()
        derived = ["offline_buffer", "_heldout", "_segments", "_replay_is_offline", "_in_offline_phase"]
        derived += ["_batch_norm_pairs", "_batch_norm_statistics", "_loss_gradients", "_unchecked_steps"]
        derived += ["progress", "step_alpha", "step_eta", "_constructor_dataset_loaded"]
        by_name = isinstance(self.dataset, str) or (
            isinstance(self.dataset, (list, tuple)) and all(isinstance(d, str) for d in self.dataset)
        )
        return [*super()._excluded_save_params(), *networks, *derived, *([] if by_name else ["dataset"])]

    def __getstate__(self) -> dict[str, Any]:
        # for copies and pickles: compiled functions belong to these very weights, callbacks hold on to whole modules
        return {**vars(self), "_loss_gradients": {}, "_root_callback": None}

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
    def load(  # type: ignore[override]
        cls, path: str | pathlib.Path | io.BufferedIOBase, env: GymEnv | str | None = None, **kwargs: Any
    ) -> Any:
        """
        Load a model; see SB3's ``BaseAlgorithm.load``.

        :param path: file that :meth:`save` wrote
        :param env: environment to train in, or its id
        :param kwargs: SB3's further arguments, and constructor arguments to change
        :return: the model
        :raises TypeError: if a name in ``kwargs`` is none of them (SB3 would set it and ignore it)
        :raises ValueError: if an argument is out of its range, or would make other networks
        :raises ModelFileError: if the file is damaged, or holds another algorithm's model
        """
        unknown = kwargs.keys() - inspect.signature(super().load).parameters.keys() - argument_names(cls)
        if unknown:
            raise TypeError(f"{cls.__name__}.load() got unexpected arguments {sorted(unknown)}.")
        if env is not None:
            env = cls._wrap_env(maybe_make_env(env, 0), 0)
        if "stats_window_size" in kwargs:  # SB3 keeps it under another name
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        return load_model(super().load, path, env, cls.__name__, kwargs)
