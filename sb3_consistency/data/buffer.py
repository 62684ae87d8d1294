"""From episodes to rows of an SB3 replay buffer: checks, conversion, layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from tqdm.auto import tqdm

from sb3_consistency.data.episodes import DatasetError, Episode, EpisodeSource
from sb3_consistency.envs.spaces import action_bounds, channels_first_space, flat_space, is_normalised_space
from sb3_consistency.envs.wrappers import flatten_nested


class Segment(NamedTuple):
    """Rows of the offline buffer that hold one dataset, and the share of the batches drawn from it."""

    start: int
    stop: int
    share: float


class EpisodeConverter:
    """
    Turns the episodes of one dataset into what the replay buffer of given spaces holds.

    :param source: the dataset
    :param observation_space: observation space of the model
    :param action_space: action space of the model
    :raises DatasetError: if the spaces don't match
    """

    def __init__(self, source: EpisodeSource, observation_space: spaces.Space, action_space: spaces.Box) -> None:
        self.source = source
        self.observation_space = observation_space
        self.action_space = action_space
        self.n_clipped = 0
        self._check_action_space()
        self._check_observation_space()

    def _check_action_space(self) -> None:
        theirs, ours = self.source.action_space, self.action_space
        if theirs is None:
            return
        if not isinstance(theirs, spaces.Box):
            raise DatasetError(f"{self.source.name} has actions in {theirs}: only continuous (Box) actions can be learned.")
        if theirs.shape != ours.shape:
            raise DatasetError(f"Action spaces don't match: {self.source.name} has {theirs}, the environment has {ours}.")
        same = np.allclose(theirs.low, ours.low) and np.allclose(theirs.high, ours.high)
        if not same and "action_space" not in self.source.inferred and np.isfinite([theirs.low, theirs.high]).all():
            raise DatasetError(
                f"Action bounds don't match: {self.source.name} has {theirs}, the environment has {ours}. "
                "Wrap the environment (gymnasium.wrappers.RescaleAction) so that actions mean the same in both."
            )

    def _check_observation_space(self) -> None:
        if self.source.observation_space is None:
            return
        theirs, ours = flat_space(self.source.observation_space), self.observation_space
        if isinstance(theirs, spaces.Dict) != isinstance(ours, spaces.Dict):
            raise DatasetError(f"Observation spaces don't match: {self.source.name} has {theirs}, the environment has {ours}.")
        if isinstance(theirs, spaces.Dict) and isinstance(ours, spaces.Dict):
            if theirs.keys() != ours.keys():
                raise DatasetError(
                    f"Observation keys don't match: {self.source.name} has {sorted(theirs)}, "
                    f"the environment has {sorted(ours)}."
                )
            pairs = [(f" {key!r}", theirs[key], ours[key]) for key in ours]
        else:
            pairs = [("", theirs, ours)]
        for key, their_space, our_space in pairs:
            if our_space.shape not in (their_space.shape, channels_first_space(their_space).shape):
                raise DatasetError(
                    f"Observation spaces{key} don't match: {self.source.name} has {their_space}, "
                    f"the environment has {our_space}."
                )

    def __call__(self, episode: Episode, index: int) -> Episode:
        """
        :param episode: episode as the source gives it
        :param index: its number, for messages
        :return: episode with flat observations of the model's space and scaled, clipped actions (T, A)
        :raises DatasetError: if the episode has NaN or infinite values, or shapes that don't fit
        """
        where = f"{self.source.name}, episode {index}"
        self._check_finite(np.asarray(episode.rewards), f"{where}: rewards")
        return replace(
            episode,
            observations=self._observations(episode.observations, f"{where}: observations"),
            next_observations=self._observations(episode.next_observations, f"{where}: next_observations"),
            actions=self._actions(np.asarray(episode.actions), f"{where}: actions"),
            rewards=np.asarray(episode.rewards, dtype=np.float32),
            terminations=np.asarray(episode.terminations, dtype=bool),
            truncations=np.asarray(episode.truncations, dtype=bool),
        )

    def _observations(self, observations: Any, where: str) -> Any:
        if isinstance(self.observation_space, spaces.Dict):
            flat = flatten_nested(observations)
            return {k: self._observation(flat[k], s, f"{where} {k!r}") for k, s in self.observation_space.spaces.items()}
        return self._observation(np.asarray(observations), self.observation_space, where)

    def _observation(self, array: np.ndarray, space: spaces.Space, where: str) -> np.ndarray:
        self._check_finite(array, where)
        shape = space.shape or ()
        if array.shape[1:] != shape and array.ndim == 4 and array.transpose(0, 3, 1, 2).shape[1:] == shape:
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1:] != shape and int(np.prod(array.shape[1:])) != int(np.prod(shape)):
            raise DatasetError(f"{where} have shape {array.shape[1:]} per step, the environment's have {shape}.")
        return array.reshape(len(array), *shape)

    def _actions(self, actions: np.ndarray, where: str) -> np.ndarray:
        shape = self.action_space.shape
        if np.issubdtype(actions.dtype, np.integer) and actions.shape[1:] != shape:
            raise DatasetError(f"{where} are discrete ({actions.dtype}): only continuous (Box) actions can be learned.")
        if int(np.prod(actions.shape[1:])) != int(np.prod(shape)) or actions.ndim < 2:
            raise DatasetError(f"{where} have shape {actions.shape[1:]} per step, the environment's have {shape}.")
        self._check_finite(actions, where)
        actions = actions.reshape(len(actions), -1).astype(np.float64)
        if not self.source.scaled_actions:
            bounds = action_bounds(self.action_space)
            actions = (actions - bounds.middle.reshape(-1)) / bounds.half_range.reshape(-1)
        self.n_clipped += int((np.abs(actions) > 1 + 1e-5).any(axis=1).sum())
        return actions.clip(-1, 1).astype(np.float32)

    @staticmethod
    def _check_finite(array: np.ndarray, where: str) -> None:
        if not np.issubdtype(array.dtype, np.floating):
            return
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32, copy=False))  # what the networks get
        if not finite.all():
            step = np.argwhere(~finite)[0]
            raise DatasetError(
                f"{where}: {array[tuple(step)]} at step {step[0]} (index {tuple(int(i) for i in step)}); finite float32 "
                "numbers are needed."
            )

    def warn_if_clipped(self, n_transitions: int) -> None:
        """
        :param n_transitions: number of transitions converted
        """
        if self.n_clipped:
            share = 100 * self.n_clipped / n_transitions
            warnings.warn(
                f"{self.source.name}: clipped the actions of {self.n_clipped} of {n_transitions} transitions ({share:.2g} %), "
                f"which lay outside {self.action_space}.",
                stacklevel=5,
            )


class ObservationStatistics:
    """
    Running mean and standard deviation of the continuous entries of observations.

    :param observation_space: observation space of the model
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        entries = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self.running = {
            key: RunningMeanStd(epsilon=1e-9, shape=space.shape or ())
            for key, space in entries.items()
            if is_normalised_space(space)
        }

    def update(self, observations: Any) -> None:
        """
        :param observations: array (T, ...) or a dict of them
        """
        for key, running in self.running.items():
            entry = observations[key] if isinstance(observations, Mapping) else observations
            running.update(entry.astype(np.float64))  # squares of large float32 numbers overflow

    @property
    def mean(self) -> dict[str, np.ndarray]:
        """Mean per key ("" for observations that are no dict)."""
        return {key: running.mean for key, running in self.running.items()}

    @property
    def std(self) -> dict[str, np.ndarray]:
        """Standard deviation per key."""
        return {key: np.sqrt(running.var) for key, running in self.running.items()}


def block_rows(n_transitions: int, n_envs: int) -> int:
    """
    :param n_transitions: size of one dataset
    :param n_envs: number of columns of the buffer
    :return: number of buffer rows that the dataset takes
    """
    return -(-n_transitions // n_envs)


class BlockWriter:
    """
    Writes the transitions of one dataset into consecutive rows of a replay buffer.

    Every column (environment) gets one contiguous slice of time, whose last row is marked truncated: n-step returns and
    windows never cross from one episode into another. Slices differ by at most one row; a column that is one
    row short repeats its last transition.

    :param buffer: the buffer; rows ``first_row`` to ``first_row + block_rows(...)`` must exist
    :param first_row: first row of the block
    :param n_transitions: number of transitions that will be written
    """

    def __init__(self, buffer: ReplayBuffer, first_row: int, n_transitions: int) -> None:
        self.buffer = buffer
        self.first_row = first_row
        self.n_rows = block_rows(n_transitions, buffer.n_envs)
        self.bounds = [column * n_transitions // buffer.n_envs for column in range(buffer.n_envs + 1)]
        self.column = 0
        self.written = 0

    def write(self, episode: Episode) -> None:
        """
        :param episode: converted episode, whose transitions follow those written before
        """
        start = 0
        while start < len(episode):
            while self.written >= self.bounds[self.column + 1]:
                self.column += 1
            stop = min(len(episode), start + self.bounds[self.column + 1] - self.written)
            self._write_piece(episode, start, stop)
            start = stop

    def _write_piece(self, episode: Episode, start: int, stop: int) -> None:
        buffer, column, source = self.buffer, self.column, slice(start, stop)
        row = self.first_row + self.written - self.bounds[column]
        rows = slice(row, row + stop - start)
        _assign(buffer.observations, rows, column, episode.observations, source)
        if buffer.optimize_memory_usage:
            buffer.observations[(rows.stop) % buffer.buffer_size, column] = episode.next_observations[stop - 1].reshape(
                buffer.observations.shape[2:]
            )
        else:
            _assign(buffer.next_observations, rows, column, episode.next_observations, source)
        buffer.actions[rows, column] = episode.actions[source]
        buffer.rewards[rows, column] = episode.rewards[source]
        buffer.dones[rows, column] = episode.terminations[source] | episode.truncations[source]
        if buffer.handle_timeout_termination:
            buffer.timeouts[rows, column] = episode.truncations[source] & ~episode.terminations[source]
        self.written += stop - start
        last = rows.stop - 1
        column_is_full = self.written == self.bounds[column + 1]
        if (column_is_full or stop == len(episode)) and not buffer.dones[last, column]:
            buffer.dones[last, column] = 1
            buffer.timeouts[last, column] = float(buffer.handle_timeout_termination)
        if isinstance(buffer, HerReplayBuffer):
            buffer.ep_start[rows, column] = row
            buffer.ep_length[rows, column] = stop - start
        if column_is_full and rows.stop < self.first_row + self.n_rows:
            self._repeat_row(last)

    def _repeat_row(self, row: int) -> None:
        buffer, column = self.buffer, self.column
        arrays: list[Any] = [buffer.observations, buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts]
        if not buffer.optimize_memory_usage:
            arrays.append(buffer.next_observations)
        for array in arrays:
            for part in array.values() if isinstance(array, Mapping) else [array]:
                part[row + 1, column] = part[row, column]
        buffer.dones[row + 1, column] = 1
        if isinstance(buffer, HerReplayBuffer):
            buffer.ep_start[row + 1, column] = row + 1
            buffer.ep_length[row + 1, column] = 1


def _assign(target: Any, rows: slice, column: int, values: Any, source: slice) -> None:
    if isinstance(target, Mapping):
        for key in target:
            _assign(target[key], rows, column, values[key], source)
    else:
        target[rows, column] = values[source].reshape(-1, *target.shape[2:])


def set_size(buffer: ReplayBuffer, n_rows: int) -> None:
    """
    Tell the buffer how many rows are filled.

    :param buffer: buffer whose first ``n_rows`` rows were written
    :param n_rows: number of rows
    """
    buffer.full = n_rows >= buffer.buffer_size
    buffer.pos = n_rows % buffer.buffer_size
    if isinstance(buffer, HerReplayBuffer):
        buffer._current_ep_start[:] = buffer.pos


def fill(
    buffer: ReplayBuffer,
    converters: Sequence[EpisodeConverter],
    episodes: Sequence[np.ndarray],
    sizes: Sequence[int],
    statistics: ObservationStatistics,
    progress_bar: bool,
) -> list[tuple[int, int]]:
    """
    Write datasets into an empty replay buffer, one after the other.

    :param buffer: the buffer
    :param converters: of every dataset
    :param episodes: numbers of the episodes to write, of every dataset
    :param sizes: numbers of their transitions
    :param statistics: what to add their observations to
    :param progress_bar: show a progress bar
    :return: for every dataset, its first row and the one after its last
    """
    ranges, first_row = [], 0
    with tqdm(total=sum(sizes), desc="Loading", unit="step", unit_scale=True, disable=not progress_bar) as bar:
        for converter, chosen, size in zip(converters, episodes, sizes, strict=True):
            writer = BlockWriter(buffer, first_row, size)
            for episode in converted_episodes(converter, chosen):
                writer.write(episode)
                statistics.update(episode.observations)
                bar.update(len(episode))
            ranges.append((first_row, first_row + block_rows(size, buffer.n_envs)))
            first_row = ranges[-1][1]
    set_size(buffer, first_row)
    return ranges


def converted_episodes(converter: EpisodeConverter, indices: Iterable[int]) -> Iterator[Episode]:
    """
    :param converter: converter of a dataset
    :param indices: numbers of the episodes
    :return: the converted episodes, one at a time
    """
    indices = list(indices)
    for index, episode in zip(indices, converter.source.episodes(indices), strict=True):
        yield converter(episode, index)
