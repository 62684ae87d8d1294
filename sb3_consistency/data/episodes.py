"""What a dataset is to the rest of the package: numbered episodes, read as blocks of transitions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError, Observations, map_observations
from sb3_consistency.envs.wrappers import make_known

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.envs.registration import EnvSpec

#: about so many bytes of transitions are converted at a time
BLOCK_BYTES = 2**20


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


@dataclass(frozen=True)
class Block(Episode):
    """
    Transitions of several episodes, or of a part of one, in their order: what is read, converted and written at a time.

    ``ends`` (T,) marks the last step of an episode; ``numbers`` and ``steps`` (T,) say which episode, and which of its
    steps, a row is.
    """

    ends: np.ndarray
    numbers: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, episodes: Sequence[Episode], numbers: Sequence[int]) -> Block:
        """
        :param episodes: whole episodes, at least one
        :param numbers: their numbers in the dataset
        :return: the block of them
        """
        parts = [{f.name: getattr(episode, f.name) for f in fields(Episode)} for episode in episodes]
        joined = {key: map_observations(_concatenate, *(part[key] for part in parts)) for key in parts[0]}
        lengths = [len(episode) for episode in episodes]
        ends = np.zeros(sum(lengths), bool)
        ends[np.cumsum(lengths) - 1] = True
        steps = np.concatenate([np.arange(n) for n in lengths])
        return cls(**joined, ends=ends, numbers=np.repeat(numbers, lengths), steps=steps)


def _concatenate(*parts: np.ndarray) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class EpisodeSource(ABC):
    """
    A dataset seen as numbered episodes.

    :param name: how messages call the dataset
    """

    observation_space: spaces.Space | None = None
    action_space: spaces.Space | None = None
    #: whether rewards were recorded; where they were not, they read as zeros
    has_rewards: bool = True
    #: of the environment that the dataset was recorded in, where the dataset tells
    env_spec: EnvSpec | None = None
    #: returns of a random and of an expert policy, for normalized scores
    reference_returns: tuple[float, float] | None = None
    #: which of "observation_space" and "action_space" are not stated but inferred from the arrays
    inferred: tuple[str, ...] = ()
    #: what reading left out or had to assume, told once when the data is loaded
    notes: tuple[str, ...] = ()
    #: whether actions are already scaled to [-1, 1], as in SB3's buffers
    scaled_actions: bool = False

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def env_specs(self) -> list[EnvSpec]:
        """Of all environments that the dataset names: the one it was recorded in, and perhaps one for evaluation."""
        return [] if self.env_spec is None else [self.env_spec]

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

    def blocks(self, indices: Iterable[int]) -> Iterator[Block]:
        """
        Read episodes as blocks, so that the cost of loading is one per row and not one per episode.

        :param indices: numbers of the episodes
        :return: the blocks; every episode ends in one, marked in ``ends``
        :raises DatasetError: if an episode is damaged
        """
        indices = list(indices)
        waiting: list[Episode] = []
        numbers: list[int] = []
        size, layout = 0, None
        for number, episode in zip(indices, self.episodes(indices), strict=True):
            # a broken episode may not fit to the others: it is looked at alone
            full = size >= BLOCK_BYTES or len(waiting) >= 1024 or layout != _layout(episode)
            if waiting and full:
                yield Block.of(waiting, numbers)
                waiting, numbers, size = [], [], 0
            layout = _layout(episode)
            waiting.append(episode)
            numbers.append(number)
            size += _n_bytes(episode.observations)
        if waiting:
            yield Block.of(waiting, numbers)

    def require_rewards(self, needed_by: str) -> None:
        """
        :param needed_by: what needs rewards, for the message
        :raises DatasetError: if none were recorded
        """
        if not self.has_rewards:
            raise DatasetError(
                f"{self.name} has no rewards, which {needed_by} needs: add them to the data, or clone its behaviour with "
                "ConsistencyBC or DiffusionBC, which need none."
            )

    def make_env(self, eval_env: bool = True) -> gym.Env:
        """
        Make the environment that the dataset was recorded in.

        :param eval_env: the one meant for evaluation, where the dataset names one
        :raises DatasetError: if the dataset does not say which it is
        """
        if self.env_spec is None:
            raise DatasetError(f"{self.name} does not name its environment: pass env=...")
        return self._make(self.env_spec)

    def _make(self, spec: EnvSpec) -> gym.Env:
        import gymnasium as gym

        make_known(spec.id)
        try:
            return gym.make(spec)
        except Exception as error:  # gymnasium.error.*, or the ImportError of a missing simulator
            raise DatasetError(
                f"The environment of {self.name} ({spec.id}) can't be made: {error!r}. Install what it needs, or pass env=..."
            ) from error


def positions(lengths: np.ndarray, indices: Iterable[int], n_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Walk through episodes in equal strides, whatever their lengths are.

    :param lengths: steps of every episode, (E,)
    :param indices: numbers of the episodes to walk through
    :param n_rows: steps of a stride
    :return: for every stride, the episode of each step and its place therein, both (T,)
    """
    numbers = np.asarray(list(indices), np.int64)
    total = np.concatenate([[0], np.cumsum(lengths[numbers])])
    for first in range(0, int(total[-1]), max(1, n_rows)):
        position = np.arange(first, min(first + max(1, n_rows), int(total[-1])))
        which = np.searchsorted(total, position, side="right") - 1
        yield numbers[which], position - total[which]


def _n_bytes(observations: Observations) -> int:
    sizes: list[int] = []
    map_observations(lambda x: sizes.append(x.nbytes), observations)
    return sum(sizes)


def _layout(episode: Episode) -> list[Any]:
    """Shapes of a step: only episodes of one layout can be joined."""
    found: list[Any] = []

    def look(array: np.ndarray) -> None:
        found.append((array.shape[1:], array.dtype))

    for array in (episode.observations, episode.next_observations, episode.actions, episode.rewards):
        found.append(sorted(array) if hasattr(array, "keys") else None)
        map_observations(look, array)
    return found
