"""
Episodes from Minari datasets, arrays and SB3 replay buffers, as one stream of transitions.

The one place that knows that a Minari episode of T steps has T + 1 observations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError, Observations, as_flags, as_numbers, check_lengths, map_observations

if TYPE_CHECKING:
    import gymnasium as gym
    import minari

ARRAY_KEYS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
D4RL_KEYS = {"terminals": "terminations", "timeouts": "truncations"}


@dataclass(frozen=True)
class Episode:
    """
    T consecutive transitions: entry t of every array belongs to step t.

    ``terminations`` and ``truncations`` are boolean, (T,); ``rewards`` is (T,).
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: Observations
    terminations: np.ndarray
    truncations: np.ndarray

    def __len__(self) -> int:
        return len(self.rewards)


class EpisodeSource(ABC):
    """
    A dataset seen as numbered episodes.

    :param name: how messages call the dataset
    """

    observation_space: spaces.Space | None = None
    action_space: spaces.Space | None = None
    #: returns of a random and of an expert policy, for normalized scores
    reference_returns: tuple[float, float] | None = None
    #: which of "observation_space" and "action_space" are not stated but inferred from the arrays
    inferred: tuple[str, ...] = ()
    #: whether actions are already scaled to [-1, 1], as in SB3's buffers
    scaled_actions: bool = False

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Number of steps of every episode, (E,)."""

    @property
    @abstractmethod
    def returns(self) -> np.ndarray:
        """Undiscounted return of every episode, (E,)."""

    @abstractmethod
    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        """
        Read episodes one at a time.

        :param indices: numbers of the episodes
        :raises DatasetError: if an episode is damaged
        """

    def make_env(self, eval_env: bool = True) -> gym.Env:
        """
        Make the environment that the dataset was recorded in.

        :param eval_env: the one meant for evaluation, where the dataset names one
        :raises DatasetError: if the dataset does not say which it is
        """
        raise DatasetError(f"{self.name} does not name its environment: pass env=...")


class MinariSource(EpisodeSource):
    """
    Episodes of a Minari dataset.

    :param dataset: the dataset
    """

    def __init__(self, dataset: minari.MinariDataset) -> None:
        super().__init__(f"dataset {dataset.id}")
        self.dataset = dataset
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space
        low, high = (dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score"))
        if low is not None and high is not None:
            self.reference_returns = (float(low), float(high))

    @cached_property
    def _metadata(self) -> list[dict[str, Any]]:
        try:
            return [dict(m) for m in self.dataset.storage.get_episode_metadata(self.dataset.episode_indices)]
        except Exception as error:  # whatever the storage's library raises on a damaged file
            raise DatasetError(f"{self.name} is damaged: {error!r}. Delete and fetch or record it again.") from error

    @cached_property
    def _stated_lengths(self) -> np.ndarray:
        try:
            return np.array([int(m["total_steps"]) for m in self._metadata], dtype=np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.name} is damaged: an episode does not tell its total_steps: {error!r}.") from error

    @cached_property
    def lengths(self) -> np.ndarray:
        for _ in self.episodes(np.flatnonzero(self._stated_lengths < 1)):
            pass  # reading one compares its number of steps, which would else be left out unread
        return self._stated_lengths

    @cached_property
    def returns(self) -> np.ndarray:
        if all("rewards_sum" in m for m in self._metadata):
            return np.array([float(m["rewards_sum"]) for m in self._metadata])
        return np.array([float(e.rewards.sum()) for e in self.episodes(range(len(self.lengths)))])

    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        indices = list(indices)
        stream = iter(self.dataset.storage.get_episodes(self.dataset.episode_indices[indices]))
        for index in indices:
            try:
                data = next(stream)
            except Exception as error:  # as above
                raise DatasetError(f"{self.name}, episode {index} is damaged: {error!r}.") from error
            yield self._checked(index, data)

    def _checked(self, index: int, data: Mapping[str, Any]) -> Episode:
        where = f"{self.name}, episode {index}"
        missing = [key for key in ARRAY_KEYS if key not in data and key != "next_observations"]
        if missing:
            raise DatasetError(f"{where} is damaged: it has no {missing}.")
        arrays = {key: as_numbers(f"{where}: {key}", data[key]) for key in ("actions", "rewards")}
        flags = {key: as_flags(f"{where}: {key}", data[key]) for key in ("terminations", "truncations")}
        observations = map_observations(lambda x: as_numbers(f"{where}: observations", x), data["observations"])
        n_steps = check_lengths(self.name, index, {"observations": observations, **arrays, **flags})
        if n_steps != self._stated_lengths[index]:
            raise DatasetError(f"{where} is damaged: it has {n_steps} steps, its metadata says {self._stated_lengths[index]}.")
        return Episode(
            observations=map_observations(lambda x: x[:-1], observations),
            next_observations=map_observations(lambda x: x[1:], observations),
            **arrays,
            **flags,
        )

    def make_env(self, eval_env: bool = True) -> gym.Env:
        if self.dataset.env_spec is None:
            return super().make_env()
        try:
            return self.dataset.recover_environment(eval_env=eval_env)
        except Exception as error:  # gymnasium.error.*, or the ImportError of a missing simulator
            raise DatasetError(
                f"The environment of {self.name} ({self.dataset.env_spec.id}) can't be made: {error!r}. "
                "Install what it needs, or pass env=..."
            ) from error


class ArraySource(EpisodeSource):
    """
    Episodes cut out of plain arrays.

    An episode ends where ``terminations`` or ``truncations`` is set, and where a row's next observation is not the
    next row's observation (then it counts as truncated), and at the last row.

    :param arrays: ``observations, actions, rewards, next_observations, terminations, truncations``, each with one row
        per step, the last two also under D4RL's names ``terminals, timeouts``; optionally ``observation_space`` and
        ``action_space``
    :param name: how messages call the dataset
    :raises DatasetError: if an array is missing, empty or of another length
    """

    def __init__(self, arrays: Mapping[str, Any], name: str = "the mapping of arrays") -> None:
        super().__init__(name)
        renamed = {ours: arrays[theirs] for theirs, ours in D4RL_KEYS.items() if theirs in arrays}
        arrays = {**renamed, **arrays}
        missing = [key for key in ARRAY_KEYS if key not in arrays]
        if missing:
            raise DatasetError(f"{name}: missing {missing}, got {sorted(arrays)}; needed are {list(ARRAY_KEYS)}.")
        self.observation_space = arrays.get("observation_space")
        self.action_space = arrays.get("action_space")
        for key, space in {"observation_space": self.observation_space, "action_space": self.action_space}.items():
            if space is not None and not isinstance(space, spaces.Space):
                raise DatasetError(f"{name}: {key} must be a Gymnasium space, got {space!r}.")
        self.arrays = {key: self._array(key, arrays[key]) for key in ARRAY_KEYS}
        if self.arrays["rewards"].size == 0:
            raise DatasetError(f"{name}: no transitions.")
        for key in ("rewards", "terminations", "truncations"):
            array = self.arrays[key]
            if array.size != len(array):
                raise DatasetError(f"{name}: {key} must have one number per step, got shape {array.shape}.")
            self.arrays[key] = array.reshape(-1)
        n_rows = len(self.arrays["rewards"])

        def check(array: np.ndarray) -> None:
            if len(array) != n_rows:
                raise DatasetError(f"{name}: arrays of different lengths: {len(array)} {key} but {n_rows} rewards.")

        for key in ARRAY_KEYS:
            map_observations(check, self.arrays[key])
        self._infer_spaces()
        done = self.arrays["terminations"] | self.arrays["truncations"]
        ends = done.copy()
        ends[-1] = True
        ends[:-1] |= _breaks(self.name, self.arrays["observations"], self.arrays["next_observations"])
        self.stops = np.flatnonzero(ends) + 1
        self.starts = np.concatenate([[0], self.stops[:-1]])
        self.arrays["truncations"] = self.arrays["truncations"] | (ends & ~done)

    def _array(self, key: str, value: Any) -> Observations:
        convert = as_flags if key in ("terminations", "truncations") else as_numbers
        if isinstance(value, Mapping) and not ("observations" in key and value):
            raise DatasetError(f"{self.name}: {key} must be an array, got a dict with the keys {sorted(map(str, value))}.")
        return map_observations(lambda x: convert(f"{self.name}: {key}", x), value)

    def _infer_spaces(self) -> None:
        self.inferred = tuple(name for name in ("observation_space", "action_space") if getattr(self, name) is None)
        if self.observation_space is None:
            self.observation_space = _infer_space(self.arrays["observations"])
        actions = self.arrays["actions"]
        if self.action_space is None and actions.ndim > 1 and np.abs(actions).max(initial=0.0) <= 1:
            self.action_space = spaces.Box(-1, 1, actions.shape[1:], np.float32)

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @cached_property
    def returns(self) -> np.ndarray:
        return np.add.reduceat(self.arrays["rewards"].astype(np.float64), self.starts)

    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        for index in indices:
            rows = slice(self.starts[index], self.stops[index])
            yield Episode(**{key: map_observations(lambda x, r=rows: x[r], self.arrays[key]) for key in ARRAY_KEYS})


def _infer_space(observations: Observations) -> spaces.Space:
    if isinstance(observations, Mapping):
        return spaces.Dict({key: _infer_space(entry) for key, entry in observations.items()})
    if observations.dtype == np.uint8:
        return spaces.Box(0, 255, observations.shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float32)


def _breaks(name: str, observations: Observations, next_observations: Observations) -> np.ndarray:
    """Rows t (but the last) whose next observation is not the observation of row t + 1."""

    def differs(now: np.ndarray, following: np.ndarray) -> np.ndarray:
        if now.shape != following.shape:
            raise DatasetError(f"{name}: observations have shape {now.shape}, next_observations {following.shape}.")
        a, b = following[:-1], now[1:]
        # NaN equals NaN here: it is reported later
        return ((a != b) & ~((a != a) & (b != b))).any(axis=tuple(range(1, a.ndim)))

    if isinstance(observations, Mapping) or isinstance(next_observations, Mapping):
        keys = [sorted(o) if isinstance(o, Mapping) else None for o in (observations, next_observations)]
        if keys[0] != keys[1]:
            raise DatasetError(f"{name}: observations have the keys {keys[0]}, next_observations {keys[1]}.")
        parts = [_breaks(name, observations[key], next_observations[key]) for key in observations]
        return np.logical_or.reduce(parts)
    return differs(observations, next_observations)


class BufferSource(EpisodeSource):
    """
    Episodes of an SB3 replay buffer, read in place.

    :param buffer: a ``ReplayBuffer`` or ``DictReplayBuffer`` with at least one transition
    :param name: how messages call the dataset
    :raises DatasetError: if the buffer is empty
    """

    scaled_actions = True

    def __init__(self, buffer: Any, name: str = "the replay buffer") -> None:
        super().__init__(name)
        size = self._check(buffer)
        self.buffer = buffer
        self.observation_space = buffer.observation_space
        self.action_space = buffer.action_space
        # oldest row first; with one array for both, the row at the write position has no valid successor
        first = (buffer.pos + int(buffer.optimize_memory_usage)) % size if buffer.full else 0
        n_rows = size - int(buffer.optimize_memory_usage and buffer.full)
        self.rows = (first + np.arange(n_rows)) % buffer.buffer_size
        self.pieces: list[tuple[int, int, int]] = []
        for column in range(buffer.n_envs):
            ends = buffer.dones[self.rows, column].astype(bool)
            ends[-1] = True
            stops = np.flatnonzero(ends) + 1
            self.pieces += [(column, a, b) for a, b in pairwise([0, *stops.tolist()])]

    def _check(self, buffer: Any) -> int:
        """A buffer comes from a pickle, perhaps of another version or cut by hand: its size, if its arrays fit together."""
        if not (isinstance(buffer.pos, int) and 0 <= buffer.pos < buffer.buffer_size):
            raise DatasetError(f"{self.name} is damaged: position {buffer.pos} of {buffer.buffer_size} rows.")
        if buffer.size() == 0:
            raise DatasetError(f"{self.name}: no transitions.")
        names = ["observations", "actions", "rewards", "dones", "timeouts"]
        names += [] if buffer.optimize_memory_usage else ["next_observations"]
        expected = (buffer.buffer_size, buffer.n_envs)

        def check(array: Any) -> None:
            if as_numbers(f"{self.name}: {name}", array).shape[:2] != expected:
                raise DatasetError(f"{self.name} is damaged: {name} have shape {array.shape}, expected {expected} in front.")

        for name in names:
            map_observations(check, getattr(buffer, name, None))
        return int(buffer.size())

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([stop - start for _, start, stop in self.pieces], dtype=np.int64)

    @cached_property
    def returns(self) -> np.ndarray:
        return np.array([self.buffer.rewards[self.rows[a:b], c].sum() for c, a, b in self.pieces], dtype=np.float64)

    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        buffer = self.buffer
        for index in indices:
            column, start, stop = self.pieces[index]
            rows = self.rows[start:stop]
            observations = map_observations(lambda x, r=rows, c=column: x[r, c], buffer.observations)
            if buffer.optimize_memory_usage:
                next_observations = buffer.observations[(rows + 1) % buffer.buffer_size, column]
            else:
                next_observations = map_observations(lambda x, r=rows, c=column: x[r, c], buffer.next_observations)
            dones, timeouts = (array[rows, column].astype(bool) for array in (buffer.dones, buffer.timeouts))
            truncations = dones & timeouts
            truncations[-1] |= not dones[-1]
            yield Episode(
                observations=observations,
                actions=buffer.actions[rows, column],
                rewards=buffer.rewards[rows, column],
                next_observations=next_observations,
                terminations=dones & ~timeouts,
                truncations=truncations,
            )
