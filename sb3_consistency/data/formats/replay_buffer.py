"""Replay buffers of SB3, in memory or in the files that ``save_replay_buffer`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_consistency.data.checks import DatasetError, Observations, as_numbers, map_observations
from sb3_consistency.data.episodes import BLOCK_BYTES, Block, Episode, EpisodeSource, positions
from sb3_consistency.data.flat import breaks, infer_space
from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.data.safe_file import warn_of_pickle


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
        # a stack of frames needs those before: of the oldest rows they are overwritten
        n_lost = int(buffer.optimize_memory_usage) or getattr(buffer, "n_stack", 1) - 1
        n_rows = size - (min(n_lost, size - 1) if buffer.full else 0)
        first = buffer.pos + size - n_rows if buffer.full else 0
        self.rows = (first + np.arange(n_rows)) % buffer.buffer_size
        found = [(column, *self._episodes_of(column)) for column in range(buffer.n_envs)]
        self.columns = np.concatenate([np.full(len(starts), column) for column, starts, _ in found])
        self.starts, self.stops = (np.concatenate([each[i] for each in found]) for i in (1, 2))

    def _episodes_of(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """First steps of the episodes of one environment, and the ones after their last, counted from the oldest row."""
        buffer, rows = self.buffer, self.rows
        ends = buffer.dones[rows, column].astype(bool)
        ends[-1] = True
        if isinstance(buffer, FrameReplayBuffer):
            ends |= buffer.final_slot[rows, column] >= 0
        elif not buffer.optimize_memory_usage:
            # a new start that no flag marks: learn() was called again, or the environment replaced
            old, new = (
                map_observations(lambda x: _Column(x, rows, column), observations)
                for observations in (buffer.observations, buffer.next_observations)
            )
            ends[:-1] |= breaks(self.name, old, new)
        stops = np.flatnonzero(ends) + 1
        return np.concatenate([[0], stops[:-1]]), stops

    def _check(self, buffer: Any) -> int:
        """A buffer comes from a pickle, perhaps of another version or cut by hand: its size, if its arrays fit together."""
        if not (isinstance(buffer.pos, int) and 0 <= buffer.pos < buffer.buffer_size):
            raise DatasetError(f"{self.name} is damaged: position {buffer.pos} of {buffer.buffer_size} rows.")
        if buffer.size() == 0:
            raise DatasetError(f"{self.name}: no transitions.")
        names = ["observations", "actions", "rewards", "dones", "timeouts"]
        if not (buffer.optimize_memory_usage or isinstance(buffer, FrameReplayBuffer)):
            names.append("next_observations")
        expected = (buffer.buffer_size, buffer.n_envs)

        def check(array: Any) -> None:
            if as_numbers(f"{self.name}: {name}", array).shape[:2] != expected:
                raise DatasetError(f"{self.name} is damaged: {name} have shape {array.shape}, expected {expected} in front.")

        for name in names:
            map_observations(check, getattr(buffer, name, None))
        return int(buffer.size())

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @cached_property
    def returns(self) -> np.ndarray:
        sums = []
        for column in range(self.buffer.n_envs):
            rewards = self.buffer.rewards[self.rows, column].astype(np.float64)
            sums.append(np.add.reduceat(rewards, self.starts[self.columns == column]))
        return np.concatenate(sums)

    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        for index in indices:
            length = self.lengths[index]
            yield self._read(np.full(length, index), np.arange(length))

    def blocks(self, indices: Iterable[int]) -> Iterator[Block]:
        sizes: list[int] = []
        map_observations(lambda x: sizes.append(x[0, 0].nbytes), self.buffer.observations)
        for numbers, steps in positions(self.lengths, indices, BLOCK_BYTES // max(1, sum(sizes))):
            episode = self._read(numbers, steps)
            yield Block(**vars(episode), ends=steps + 1 == self.lengths[numbers], numbers=numbers, steps=steps)

    def _read(self, numbers: np.ndarray, steps: np.ndarray) -> Episode:
        buffer, columns = self.buffer, self.columns[numbers]
        rows = self.rows[self.starts[numbers] + steps]
        observations, next_observations = self._both(rows, columns)
        dones, timeouts = (array[rows, columns].astype(bool) for array in (buffer.dones, buffer.timeouts))
        return Episode(
            observations=observations,
            actions=buffer.actions[rows, columns],
            rewards=buffer.rewards[rows, columns],
            next_observations=next_observations,
            terminations=dones & ~timeouts,
            truncations=(dones & timeouts) | ((steps + 1 == self.lengths[numbers]) & ~dones),
        )

    def _both(self, rows: np.ndarray, columns: np.ndarray) -> tuple[Observations, Observations]:
        buffer = self.buffer
        if isinstance(buffer, FrameReplayBuffer):
            return buffer.observations_at(rows, columns), buffer.next_observations_at(rows, columns)
        observations = map_observations(lambda x: x[rows, columns], buffer.observations)
        if buffer.optimize_memory_usage:
            return observations, buffer.observations[(rows + 1) % buffer.buffer_size, columns]
        return observations, map_observations(lambda x: x[rows, columns], buffer.next_observations)


class _Column:
    """One environment's part of an array (rows, environments, ...), oldest row first, read in slices."""

    def __init__(self, array: np.ndarray, rows: np.ndarray, column: int) -> None:
        self._array, self._rows, self._column = array, rows, column
        self.shape, self.dtype = (len(rows), *array.shape[2:]), array.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._array[self._rows[part], self._column]


def open_pickle(path: str) -> BufferSource:
    """
    :param path: file of ``save_replay_buffer``; unpickling it runs the code in it
    :return: the episodes of the buffer
    :raises DatasetError: if it can't be read, or holds anything else
    """
    from stable_baselines3.common.save_util import load_from_pkl

    warn_of_pickle(path, "save_replay_buffer({})")
    try:
        buffer = load_from_pkl(path)
    except Exception as error:  # unpickling damaged bytes may raise anything
        raise DatasetError(f"dataset: can't read {path} as a replay buffer: {error!r}.") from error
    if not (hasattr(buffer, "dones") and hasattr(buffer, "buffer_size")):
        raise DatasetError(f"dataset: {path} holds a {type(buffer).__name__}, not a replay buffer.")
    return BufferSource(buffer, name=path)


def open_buffer(path: str) -> BufferSource:
    """
    :param path: a replay buffer: a pickle (".pkl"), or a file that executes nothing (".safetensors")
    :return: its episodes
    :raises DatasetError: if it can't be read
    """
    return open_safe_buffer(path) if path.endswith(".safetensors") else open_pickle(path)


def open_safe_buffer(path: str) -> BufferSource:
    """
    :param path: file of :func:`~sb3_consistency.data.safe_state.save_buffer`; what it holds stays in it until it is asked for
    :return: its episodes
    :raises DatasetError: if it is damaged, or holds anything else
    """
    from sb3_consistency.data.safe_state import BufferFile

    file = BufferFile(path)
    arrays = {key: tensor.mapped for key, tensor in file.tensors.items()}
    if "action_low" not in arrays:
        raise DatasetError(f"{path} has discrete actions: only continuous (Box) actions can be learned.")
    low, high = (np.array(arrays[key]) for key in ("action_low", "action_high"))
    action_space, stated = spaces.Box(low, high, dtype=low.dtype.type), file.description
    if stated["class"] == FrameReplayBuffer.__name__:
        space = _stacked_space(_observations(arrays, "frames"), stated["n_stack"])
        buffer: Any = FrameReplayBuffer(
            stated["rows"] * stated["n_envs"], space, action_space, "cpu", stated["n_envs"], n_stack=stated["n_stack"]
        )
        file.fill(buffer)
        return BufferSource(buffer, name=path)
    observations = _observations(arrays, "observations")
    whole = stated["full"] or stated["optimize_memory_usage"]
    content = {key: arrays[key] for key in ("actions", "rewards", "dones", "timeouts")}
    buffer = SimpleNamespace(
        **content,
        observations=observations,
        next_observations=None if stated["optimize_memory_usage"] else _observations(arrays, "next_observations"),
        observation_space=_stacked_space(observations, 1),
        action_space=action_space,
        n_envs=stated["n_envs"],
        buffer_size=file.n_filled,
        pos=stated["pos"] if whole else 0,
        full=bool(stated["full"]) or not whole,
        optimize_memory_usage=stated["optimize_memory_usage"],
        size=lambda: file.n_filled if stated["full"] or not whole else stated["pos"],
    )
    return BufferSource(buffer, name=path)


def _observations(arrays: dict[str, Any], front: str) -> Any:
    if front in arrays:
        return arrays[front]
    found = {key.removeprefix(f"{front}/"): array for key, array in arrays.items() if key.startswith(f"{front}/")}
    return found.get("", found)


def _stacked_space(observations: Any, n_stack: int) -> spaces.Space:
    if isinstance(observations, dict):
        return spaces.Dict({key: _stacked_space(entry, n_stack) for key, entry in observations.items()})
    shape = list(observations.shape[2:])
    space = infer_space(np.empty((0, *shape), observations.dtype))
    shape[0 if is_image_space(space) else -1] *= n_stack
    return infer_space(np.empty((0, *shape), observations.dtype))
