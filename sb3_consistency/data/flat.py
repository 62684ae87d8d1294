"""Episodes that lie one after the other in flat arrays, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError, Observations, map_observations
from sb3_consistency.data.episodes import BLOCK_BYTES, Block, Episode, EpisodeSource, positions
from sb3_consistency.data.stored import parts, take


class FlatSource(EpisodeSource):
    """
    Episodes in flat arrays.

    Step t of episode e is row ``starts[e] + t`` of everything but the observations, whose row is
    ``observation_starts[e] + t``. Without ``next_observations`` the next one is one row further; where
    ``has_successor[e]`` is not set, the last step has none and repeats its own, which is sound where it terminates.

    :param name: how messages call the dataset
    :param observations: (nested dict of) arrays
    :param actions: array
    :param starts: first step of every episode, (E,)
    :param stops: the one after its last step, (E,), larger than ``starts``
    :param rewards: (N,), None where none were recorded
    :param terminations: boolean, (N,); None for no termination
    :param truncations: boolean, (N,); last steps that don't terminate are truncated anyway
    :param next_observations: as ``observations``, or None
    :param observation_starts: row of the first observation of every episode, (E,); None for ``starts``
    :param has_successor: (E,); None for all
    :param observation_space: of the environment; inferred where it is None
    :param action_space: of the environment; inferred for actions within [-1, 1] where it is None
    """

    def __init__(
        self,
        name: str,
        observations: Observations,
        actions: Any,
        starts: np.ndarray,
        stops: np.ndarray,
        *,
        rewards: np.ndarray | None = None,
        terminations: np.ndarray | None = None,
        truncations: np.ndarray | None = None,
        next_observations: Observations | None = None,
        observation_starts: np.ndarray | None = None,
        has_successor: np.ndarray | None = None,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
    ) -> None:
        super().__init__(name)
        n_rows = len(actions)
        self.observations, self.actions, self.next_observations = observations, actions, next_observations
        self.starts, self.stops = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
        self.observation_starts = self.starts if observation_starts is None else np.asarray(observation_starts, np.int64)
        self.has_successor = np.ones(len(self.starts), bool) if has_successor is None else has_successor
        self.has_rewards = rewards is not None
        self.rewards = np.zeros(n_rows, np.float32) if rewards is None else rewards
        self.terminations = np.zeros(n_rows, bool) if terminations is None else terminations
        self.truncations = np.zeros(n_rows, bool) if truncations is None else truncations.copy()
        self.truncations[self.stops - 1] |= ~self.terminations[self.stops - 1]
        self.observation_space, self.action_space = observation_space, action_space
        self._infer_spaces()

    def _infer_spaces(self) -> None:
        self.inferred = tuple(name for name in ("observation_space", "action_space") if getattr(self, name) is None)
        if self.observation_space is None:
            self.observation_space = infer_space(self.observations)
        if self.action_space is None and self.actions.ndim == 1 and np.issubdtype(self.actions.dtype, np.integer):
            self.action_space = spaces.Discrete(int(np.asarray(self.actions).max()) + 1)
        elif self.action_space is None and self.actions.ndim > 1 and self._largest_action() <= 1:
            self.action_space = spaces.Box(-1, 1, self.actions.shape[1:], np.float32)

    def _largest_action(self) -> float:
        row_bytes = int(np.prod(self.actions.shape[1:])) * self.actions.dtype.itemsize
        return max(float(np.abs(self.actions[rows]).max(initial=0)) for rows in parts(len(self.actions), row_bytes))

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @cached_property
    def returns(self) -> np.ndarray:
        # rows between two episodes belong to none
        bounds = np.column_stack([self.starts, self.stops]).reshape(-1)
        padded = np.append(np.asarray(self.rewards, np.float64), 0.0)
        return np.add.reduceat(padded, bounds)[::2]

    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        for index in indices:
            rows = np.arange(self.starts[index], self.stops[index])
            yield self._read(rows, np.full(len(rows), index))

    def blocks(self, indices: Iterable[int]) -> Iterator[Block]:
        for numbers, steps in positions(self.lengths, indices, BLOCK_BYTES // max(1, self._row_bytes())):
            rows = self.starts[numbers] + steps
            episode = self._read(rows, numbers)
            yield Block(**vars(episode), ends=rows + 1 == self.stops[numbers], numbers=numbers, steps=steps)

    def _row_bytes(self) -> int:
        sizes: list[int] = []
        map_observations(lambda x: sizes.append(int(np.prod(x.shape[1:])) * x.dtype.itemsize), self.observations)
        return sum(sizes)

    def _read(self, rows: np.ndarray, numbers: np.ndarray) -> Episode:
        seen = rows + (self.observation_starts - self.starts)[numbers]
        if self.next_observations is None:
            without = (rows + 1 == self.stops[numbers]) & ~self.has_successor[numbers]
            both = map_observations(lambda x: _pair(x, seen, seen + ~without), self.observations)
            observations = map_observations(lambda pair: pair[0], both)
            following = map_observations(lambda pair: pair[1], both)
        else:
            observations = map_observations(lambda x: take(x, seen), self.observations)
            following = map_observations(lambda x: take(x, seen), self.next_observations)
        return Episode(
            observations=observations,
            next_observations=following,
            actions=take(self.actions, rows),
            rewards=self.rewards[rows],
            terminations=self.terminations[rows],
            truncations=self.truncations[rows],
        )


def _pair(array: Any, rows: np.ndarray, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in one read: a file that is decompressed as it is read would else start again."""
    if isinstance(array, np.ndarray):
        return array[rows], array[following]
    both = take(array, np.concatenate([rows, following]))
    return both[: len(rows)], both[len(rows) :]


def infer_space(observations: Observations) -> spaces.Space:
    """
    :param observations: (nested dict of) arrays with one row per step
    :return: a space of their shapes; arrays tell no bounds
    """
    if isinstance(observations, Mapping):
        return spaces.Dict({key: infer_space(entry) for key, entry in observations.items()})
    if observations.dtype == np.uint8:
        return spaces.Box(0, 255, observations.shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float32)


def breaks(name: str, observations: Observations, next_observations: Observations) -> np.ndarray:
    """
    :param name: how messages call the dataset
    :param observations: (nested dict of) arrays, (N, ...)
    :param next_observations: of the same structure
    :return: rows t (but the last) whose next observation is not the observation of row t + 1, (N - 1,)
    :raises DatasetError: if their structures or shapes differ
    """
    if isinstance(observations, Mapping) or isinstance(next_observations, Mapping):
        keys = [sorted(o) if isinstance(o, Mapping) else None for o in (observations, next_observations)]
        if keys[0] != keys[1]:
            raise DatasetError(f"{name}: observations have the keys {keys[0]}, next_observations {keys[1]}.")
        found = [breaks(name, observations[key], next_observations[key]) for key in observations]
        return np.logical_or.reduce(found)
    now, following = observations, next_observations
    if now.shape != following.shape:
        raise DatasetError(f"{name}: observations have shape {now.shape}, next_observations {following.shape}.")
    pieces, previous = [], None
    for rows in parts(len(now), int(np.prod(now.shape[1:])) * now.dtype.itemsize):
        here, after = now[rows], following[rows]
        if previous is not None:
            pieces.append(differs(previous[None], here[:1]))
        pieces.append(differs(after[:-1], here[1:]))
        previous = after[-1]
    return np.concatenate(pieces)


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """
    :param a: array, (N, ...)
    :param b: array of its shape
    :return: rows that differ, (N,); NaN equals NaN here: it is reported later
    """
    return ((a != b) & ~((a != a) & (b != b))).any(axis=tuple(range(1, a.ndim)))
