"""The rows of an SB3 replay buffer: their layout, and filling it with datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from tqdm.auto import tqdm

from sb3_consistency.data.checks import map_observations
from sb3_consistency.data.converter import EpisodeConverter
from sb3_consistency.data.episodes import Block
from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.data.statistics import ObservationStatistics


class Segment(NamedTuple):
    """Rows of the offline buffer that hold one dataset, and the share of the batches drawn from it."""

    start: int
    stop: int
    share: float


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
        #: of the column's running episode, its first row
        self.episode_row = first_row

    def write(self, block: Block) -> None:
        """
        :param block: converted transitions, which follow those written before
        """
        start = 0
        while start < len(block):
            while self.written >= self.bounds[self.column + 1]:
                self.column += 1
                self.episode_row = self.first_row
            stop = min(len(block), start + self.bounds[self.column + 1] - self.written)
            self._write_piece(block, start, stop)
            start = stop

    def _write_piece(self, block: Block, start: int, stop: int) -> None:
        buffer, column, source = self.buffer, self.column, slice(start, stop)
        row = self.first_row + self.written - self.bounds[column]
        rows = slice(row, row + stop - start)
        self.written += stop - start
        column_is_full = self.written == self.bounds[column + 1]
        ends = block.ends[source].copy()
        ends[-1] |= column_is_full
        if isinstance(buffer, FrameReplayBuffer):
            now, following = (map_observations(lambda x: x[source], x) for x in (block.observations, block.next_observations))
            buffer.write_observations(rows, column, now, following, ends, self.episode_row)
        else:
            self._write_observations(block, rows, source)
        buffer.actions[rows, column] = block.actions[source]
        buffer.rewards[rows, column] = block.rewards[source]
        terminations = block.terminations[source]
        truncations = block.truncations[source] | (ends & ~terminations)
        buffer.dones[rows, column] = terminations | truncations
        if buffer.handle_timeout_termination:
            buffer.timeouts[rows, column] = truncations & ~terminations
        self._mark_episodes(np.flatnonzero(ends) + row + 1)
        if column_is_full and rows.stop < self.first_row + self.n_rows:
            self._repeat_row(rows.stop - 1)

    def _write_observations(self, block: Block, rows: slice, source: slice) -> None:
        buffer, column = self.buffer, self.column
        _assign(buffer.observations, rows, column, block.observations, source)
        if buffer.optimize_memory_usage:
            after = rows.stop % buffer.buffer_size
            last = slice(source.stop - 1, source.stop)
            _assign(buffer.observations, slice(after, after + 1), column, block.next_observations, last)
        else:
            _assign(buffer.next_observations, rows, column, block.next_observations, source)

    def _mark_episodes(self, stops: np.ndarray) -> None:
        """For HER, where an episode starts and how long it is, once its last row is written."""
        if len(stops) == 0:
            return
        starts = np.concatenate([[self.episode_row], stops[:-1]])
        lengths = stops - starts
        if isinstance(self.buffer, HerReplayBuffer):
            done = slice(self.episode_row, int(stops[-1]))
            self.buffer.ep_start[done, self.column] = np.repeat(starts, lengths)
            self.buffer.ep_length[done, self.column] = np.repeat(lengths, lengths)
        self.episode_row = int(stops[-1])

    def _repeat_row(self, row: int) -> None:
        buffer, column = self.buffer, self.column
        if isinstance(buffer, FrameReplayBuffer):
            buffer.repeat_row(row, column)
            return
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
            for block in converted_episodes(converter, chosen):
                writer.write(block)
                statistics.update(block.observations)
                bar.update(len(block))
            ranges.append((first_row, first_row + block_rows(size, buffer.n_envs)))
            first_row = ranges[-1][1]
    set_size(buffer, first_row)
    return ranges


def converted_episodes(converter: EpisodeConverter, indices: Iterable[int]) -> Iterator[Block]:
    """
    :param converter: converter of a dataset
    :param indices: numbers of the episodes
    :return: the converted episodes, in blocks
    """
    return map(converter, converter.source.blocks(indices))
