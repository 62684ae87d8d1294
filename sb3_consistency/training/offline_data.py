"""Fill the replay buffer of an SB3 off-policy algorithm with a dataset, and keep the data through online training."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.buffer import (
    EpisodeConverter,
    ObservationStatistics,
    block_rows,
    converted_episodes,
    fill,
)
from sb3_consistency.data.episodes import DatasetError, map_observations
from sb3_consistency.data.opening import dataset_spaces, open_datasets
from sb3_consistency.data.rewards import RewardFunction, fit_reward_transform
from sb3_consistency.data.selection import hold_out, select_episodes
from sb3_consistency.envs.spaces import adopted_spaces, fitting_policy
from sb3_consistency.envs.wrappers import flatten_if_nested

if TYPE_CHECKING:
    from typing import Self

# what loading data changes in a model, but for the statistics of observations and rewards
OFFLINE_STATE = (
    "replay_buffer",
    "offline_buffer",
    "_replay_is_offline",
    "_segments",
    "_reward_function",
    "_heldout",
    "_reference_returns",
)


class Segment(NamedTuple):
    """Rows of the offline buffer that hold one dataset, and the share of the batches drawn from it."""

    start: int
    stop: int
    share: float


class DatasetMixin(OffPolicyAlgorithm):
    """Adds :meth:`load_dataset` and :meth:`from_dataset` to an off-policy algorithm, and keeps its offline data."""

    policy: Any
    offline_buffer: ReplayBuffer | None
    keep_offline: bool
    normalize_observations: bool
    dataset: Any
    dataset_kwargs: dict[str, Any] | None
    pretrain_steps: int
    curriculum_steps: int | None

    def _init_offline(self) -> None:
        self.offline_buffer = None
        self._replay_is_offline = False
        self._segments: list[Segment] = []
        self._reward_function: RewardFunction | None = None
        self._heldout: dict[str, Any] | None = None
        self._reference_returns: tuple[float, float] | None = None
        self._was_pretrained = False
        self._pretrain_start: int | None = None
        self._online_timesteps: int | None = None
        self._in_offline_phase = False
        self._constructor_dataset_loaded = False
        self._curriculum_end: int | None = None
        #: spaces that an environment's take the place of; saved with the model
        self._inferred_spaces: list[str] = []

    @classmethod
    def from_dataset(
        cls, dataset: Any, policy: str | type[Any] | None = None, *, eval_env: bool = True, env: Any = None, **kwargs: Any
    ) -> Self:
        """
        Build a model for a dataset: environment, policy and data come from it.

        :param dataset: as for :meth:`load_dataset`
        :param policy: policy; None for the one that fits the observations
        :param eval_env: use the environment meant for evaluation (some collection environments never truncate)
        :param env: an environment of your own instead
        :param kwargs: further arguments of the algorithm; ``dataset_kwargs`` go to :meth:`load_dataset`
        :return: model with the data loaded
        :raises DatasetError: if the dataset can't be used or its environment can't be made
        """
        sources = open_datasets(dataset)
        if env is None:
            env = sources[0].make_env(eval_env=eval_env)
        if not isinstance(env, VecEnv):
            env = flatten_if_nested(gym.make(env) if isinstance(env, str) else env)
        if policy is None:
            policy = fitting_policy(env.observation_space)
        model: Any = cls(policy, env, dataset=dataset, **kwargs)  # type: ignore[call-arg]
        model._constructor_dataset_loaded = True  # from the sources that are open already
        model.load_dataset(sources, **(model.dataset_kwargs or {}))
        return model

    def _take_spaces_from_dataset(self) -> None:
        if self.dataset is None:
            raise ValueError(
                f"env is None: pass an environment, or dataset=... to train offline "
                f"({type(self).__name__}.from_dataset('<Minari id>') does both)."
            )
        source = open_datasets(self.dataset)[0]
        self.observation_space, self.action_space = dataset_spaces(source)
        self._inferred_spaces = list(source.inferred)
        if (
            isinstance(self.observation_space, spaces.Dict)
            and self.policy_class is not self.policy_aliases["MultiInputPolicy"]
        ):
            raise ValueError("policy: use 'MultiInputPolicy' for a dataset with Dict observations.")
        self.n_envs = 1

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment, as SB3 does. Its spaces take the place of those that were inferred from arrays.

        :param env: the environment
        :param force_reset: whether to reset it before training
        :raises ValueError: if its spaces are not the model's
        """
        env = self._wrap_env(env, self.verbose)
        before = {name: getattr(self, name) for name in self._inferred_spaces}
        self._replace_spaces(adopted_spaces(before, env))
        try:
            super().set_env(env, force_reset)
        except BaseException:
            self._replace_spaces(before)
            raise
        self._inferred_spaces = []

    def _replace_spaces(self, new: dict[str, spaces.Space]) -> None:
        for name, space in new.items():
            old = getattr(self, name)
            for holder in (self, *self.policy.modules()):
                if getattr(holder, name, None) is old:
                    setattr(holder, name, space)

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
    ) -> int:
        """
        Fill the replay buffer with a dataset, in place of what an earlier call loaded.

        Scales and clips actions to [-1, 1], keeps time-outs apart from terminations, fits the policy's observation
        statistics (and VecNormalize's) unless the model has been trained, and applies the reward transform. Nothing
        changes if anything is wrong with the data.

        :param dataset: a Minari id (local, else downloaded), a ``minari.MinariDataset``, a mapping (or ``.npz``
            file) of arrays ``observations, actions, rewards, next_observations, terminations, truncations`` (or D4RL's
            ``terminals, timeouts``), an SB3 ``ReplayBuffer`` or a file that ``save_replay_buffer`` wrote, or a list of these
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
        """
        if not 0 < top_fraction <= 1:
            raise ValueError(f"top_fraction must be in (0, 1], got {top_fraction}.")
        if not 0 <= heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}.")
        if episodes is not None and not isinstance(episodes, slice):
            episodes = np.asarray(list(episodes) if isinstance(episodes, Iterable) else [episodes])
        sources = open_datasets(dataset)
        shares = self._check_weights(weights, len(sources))
        converters = [EpisodeConverter(s, self.observation_space, self.action_space) for s in sources]  # type: ignore[arg-type]
        chosen = [select_episodes(source, episodes, top_fraction) for source in sources]
        held = [hold_out(c, heldout_fraction) for c in chosen]
        chosen = [np.setdiff1d(c, h) for c, h in zip(chosen, held, strict=True)]
        if any(len(c) == 0 for c in chosen):
            raise DatasetError(f"heldout_fraction={heldout_fraction} leaves no episode to train on: the dataset is too small.")

        sizes = [int(source.lengths[c].sum()) for source, c in zip(sources, chosen, strict=True)]
        if min(sizes) < self.n_envs:
            raise DatasetError(
                f"{sources[int(np.argmin(sizes))].name} has fewer transitions than environments ({self.n_envs})."
            )
        n_rows = sum(block_rows(size, self.n_envs) for size in sizes)
        size = (n_rows + int(self.optimize_memory_usage)) * self.n_envs
        buffer = self._new_buffer(size if self.keep_offline else max(size, self.buffer_size))
        statistics = ObservationStatistics(self.observation_space)
        ranges = fill(buffer, converters, chosen, sizes, statistics, progress_bar)
        for converter, size in zip(converters, sizes, strict=True):
            converter.warn_if_clipped(size)
        returns = np.concatenate([s.returns[c] for s, c in zip(sources, chosen, strict=True)])
        reward_function = self._transform_rewards(buffer, n_rows, reward_transform, returns)
        heldout = self._read_heldout(converters, held)

        with self._offline_state_kept_on_error():
            self._install(buffer)
            # without weights there are no shares, and no segments
            self._segments = [Segment(*rows, share) for rows, share in zip(ranges, shares, strict=False)]
            self._reward_function = reward_function
            self._heldout = heldout
            self._reference_returns = sources[0].reference_returns
            if self._n_updates == 0:
                self._fit_statistics(statistics, buffer, n_rows)
        return sum(sizes)

    @contextmanager
    def _offline_state_kept_on_error(self) -> Iterator[None]:
        kept = {name: getattr(self, name) for name in OFFLINE_STATE}
        try:
            yield
        except BaseException:
            vars(self).update(kept)
            raise

    def _check_weights(self, weights: Sequence[float] | None, n_datasets: int) -> list[float]:
        if weights is None:
            return []
        if len(weights) != n_datasets or not all(0 <= w < math.inf for w in weights) or sum(weights) <= 0:
            raise ValueError(f"weights must be {n_datasets} numbers >= 0, one per dataset and not all 0, got {list(weights)}.")
        if isinstance(self.replay_buffer, HerReplayBuffer):
            raise ValueError("weights can't be used with HerReplayBuffer, which samples whole episodes itself.")
        return [weight / sum(weights) for weight in weights]

    def _new_buffer(self, size: int) -> ReplayBuffer:
        """An empty buffer of the model's class with room for ``size`` transitions."""
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

    def _transform_rewards(
        self, buffer: ReplayBuffer, n_rows: int, transform: str | RewardFunction, returns: np.ndarray
    ) -> RewardFunction | None:
        rewards = buffer.rewards[:n_rows]
        function = fit_reward_transform(transform, rewards, returns)
        if function is None:
            return None
        if self._vec_normalize_env is not None and self._vec_normalize_env.norm_reward:
            raise ValueError("reward_transform can't be combined with VecNormalize(norm_reward=True): both rescale rewards.")
        if isinstance(buffer, HerReplayBuffer):
            raise ValueError("reward_transform can't be used with HerReplayBuffer, which asks the environment for rewards.")
        transformed = np.asarray(function(rewards.copy()), dtype=np.float32)
        if transformed.shape != rewards.shape or not np.isfinite(transformed).all():
            raise ValueError(
                f"reward_transform must return finite rewards in the shape it got, {rewards.shape}; got {transformed.shape}."
            )
        buffer.rewards[:n_rows] = transformed
        return function

    def _read_heldout(self, converters: list[EpisodeConverter], held: list[np.ndarray]) -> dict[str, Any] | None:
        episodes = [e for converter, h in zip(converters, held, strict=True) for e in converted_episodes(converter, h)]
        if not episodes:
            return None
        observations = map_observations(lambda *parts: np.concatenate(parts), *(e.observations for e in episodes))
        return {"observations": observations, "actions": np.concatenate([e.actions for e in episodes])}

    def _install(self, buffer: ReplayBuffer) -> None:
        online = self.replay_buffer is not None and self.replay_buffer.size() > 0 and not self._replay_is_offline
        if online:
            self.offline_buffer = buffer
        else:
            self.replay_buffer, self.offline_buffer, self._replay_is_offline = buffer, None, True

    def _fit_statistics(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        vec_normalize = self._vec_normalize_env
        if self.normalize_observations and not (vec_normalize is not None and vec_normalize.norm_obs):
            self._fit_normalizer(statistics, buffer, n_rows)
        if vec_normalize is None or not vec_normalize.training:
            return
        if vec_normalize.norm_obs:
            obs_rms = vec_normalize.obs_rms
            for key, running in statistics.running.items():
                # of a Dict, VecNormalize may keep statistics for some keys only
                target = obs_rms.get(key) if isinstance(obs_rms, dict) else obs_rms
                if target is not None:
                    target.update_from_moments(running.mean, running.var, running.count)
        if vec_normalize.norm_reward:
            for column in range(buffer.n_envs):
                rewards, dones = buffer.rewards[:n_rows, column].tolist(), buffer.dones[:n_rows, column].tolist()
                # VecNormalize divides by the deviation of the running discounted return, reset at episode ends
                previous_done = [1.0, *dones[:-1]]
                steps = zip(rewards, previous_done, strict=True)
                running_returns = accumulate(
                    steps, lambda total, step: total * vec_normalize.gamma * (1 - step[1]) + step[0], initial=0.0
                )
                vec_normalize.ret_rms.update(np.array(list(running_returns)[1:]))

    def _fit_normalizer(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        self.policy.fit_normalizer(statistics.mean, statistics.std)

    def _offline_data(self) -> ReplayBuffer | None:
        return self.replay_buffer if self._replay_is_offline else self.offline_buffer

    def _load_constructor_dataset(self) -> None:
        if self.dataset is not None and not self._constructor_dataset_loaded and self._offline_data() is None:
            self.load_dataset(self.dataset, **(self.dataset_kwargs or {}))
            self._constructor_dataset_loaded = True

    def _begin_online(self) -> None:
        """Keep the offline data out of the way of SB3's circular overwriting, and start a fresh buffer."""
        if self._replay_is_offline and self.keep_offline:
            self.offline_buffer, self.replay_buffer = self.replay_buffer, self._new_buffer(self.buffer_size)
            self._replay_is_offline = False
        elif self._replay_is_offline and self.replay_buffer is not None:
            # one buffer: SB3's overwriting sets in once it is full, and the rows of a dataset no longer stay together
            self._replay_is_offline = False
            self._segments = []

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer, as SB3 does: online experience, or after an offline phase alone its data.

        :param path: file to write
        """
        if not self._replay_is_offline:
            return super().save_replay_buffer(path)
        # in the file only: load_replay_buffer() shall know what it reads
        content = vars(self.replay_buffer)
        content["offline_segments"] = [tuple(segment) for segment in self._segments]
        try:
            return super().save_replay_buffer(path)
        finally:
            del content["offline_segments"]

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a buffer of online experience, as SB3 does; offline data loaded before stays, unless ``keep_offline`` is off.

        :param path: file that ``save_replay_buffer`` wrote; offline data that it wrote takes the place of what is loaded
        :param truncate_last_traj: for HER, whether the last trajectory in the buffer was finished
        :raises DatasetError: if the file is damaged; then nothing has changed
        """
        try:
            with self._offline_state_kept_on_error():
                self._begin_online()
                super().load_replay_buffer(path, truncate_last_traj)
                segments = vars(self.replay_buffer).pop("offline_segments", None)
                if segments is not None:
                    self.offline_buffer, self._replay_is_offline = None, True
                    self._segments = [Segment(*segment) for segment in segments]
        except Exception as error:  # unpickling damaged bytes may raise anything
            if isinstance(error, FileNotFoundError):
                raise
            raise DatasetError(f"{path}: damaged, or not a file of save_replay_buffer(): {error!r}.") from error

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        row = replay_buffer.pos
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self._reward_function is not None:
            # on the stored reward: VecNormalize hands on the original one
            replay_buffer.rewards[row] = self._reward_function(replay_buffer.rewards[row])
