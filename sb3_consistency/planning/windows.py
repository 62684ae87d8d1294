"""Windows of trajectories, read out of a replay buffer by index arithmetic: the data stays where it is."""

from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_consistency.data.buffer import Segment
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.training.batches import tree_map


class WindowRows(NamedTuple):
    """
    Where windows lie in a buffer: row numbers, and one column (environment) per window.

    ``rows`` (B, H) are the steps of the window and ``past`` (B, h) those up to its first, both clamped to the episode;
    ``padded`` (B, H) marks the steps that repeat the episode's last; ``columns`` is (B, 1).
    """

    rows: np.ndarray
    past: np.ndarray
    padded: np.ndarray
    columns: np.ndarray


class Windows:
    """
    The windows of a replay buffer: never across the end of an episode, also with several columns and after wrap-around.

    :param buffer: SB3 replay buffer with at least one transition
    :param horizon: number H of steps that a window holds
    :param history: number h of observations up to its first step
    :param pad: whether a window may run past the end of its episode, where it repeats the last step; else windows are
        full, and the last (H - 1) ``stride`` steps of an episode start none
    :param gamma: discount factor of the returns
    :param goal_key: key of a Dict observation whose changes end a trajectory, too; None for none
    :param stride: a window holds every ``stride``-th step
    :raises DatasetError: if there is no full window and ``pad`` is off
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        horizon: int,
        history: int,
        pad: bool,
        gamma: float,
        goal_key: str | None = None,
        stride: int = 1,
    ) -> None:
        self.buffer = buffer
        self.horizon = horizon
        self.stride = stride
        self.history = history
        order = _chronological_rows(buffer)
        n_rows, n_columns = len(order), buffer.n_envs
        ends = buffer.dones[order].astype(bool)
        ends[-1] = True
        if goal_key is not None:
            goals = buffer.observations[goal_key][order]
            ends[:-1] |= (goals[1:] != goals[:-1]).reshape(n_rows - 1, n_columns, -1).any(axis=-1)
        steps = np.arange(n_rows)[:, None]
        # first step of the trajectory that a step belongs to, and its last one
        first = np.maximum.accumulate(np.where(np.vstack([np.ones((1, n_columns), bool), ends[:-1]]), steps, 0), axis=0)
        last = np.minimum.accumulate(np.where(ends, steps, n_rows)[::-1], axis=0)[::-1]
        shape = (buffer.buffer_size, n_columns)
        self.since_start, self.to_end = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.since_start[order], self.to_end[order] = steps - first, last - steps
        self.returns = np.zeros(shape, np.float32)
        self.returns[order] = discounted_returns(buffer.rewards[order], ends, gamma)
        valid = np.zeros(shape, bool)
        valid[order] = pad | (self.to_end[order] >= (horizon - 1) * stride)
        # (row, column) of the first step of every window, ordered by row
        self.starts = np.argwhere(valid)
        if len(self.starts) == 0:
            raise DatasetError(
                f"No episode has the {(horizon - 1) * stride + 1} steps of a window (horizon={horizon}, stride={stride}); the "
                f"longest has {int(self.to_end.max()) + 1}: take a shorter horizon or stride, or pad=True."
            )

    def __len__(self) -> int:
        return len(self.starts)

    def sample(self, size: int, segments: list[Segment] | None = None) -> WindowRows:
        """
        :param size: number of windows B
        :param segments: draw from these row ranges in their shares, instead of uniformly
        :return: their places
        :raises DatasetError: if a row range has no window
        """
        if segments:
            limits = np.searchsorted(self.starts[:, 0], [(s.start, s.stop) for s in segments])
            if (limits[:, 0] == limits[:, 1]).any():
                raise DatasetError(
                    f"A dataset has no episode as long as a window (horizon={self.horizon}, stride={self.stride}): "
                    "pad=True uses shorter ones."
                )
            chosen = np.random.choice(len(segments), size=size, p=[segment.share for segment in segments])
            return self.at(self.starts[np.random.randint(*limits[chosen].T)])
        return self.at(self.starts[np.random.randint(len(self.starts), size=size)])

    def at(self, starts: np.ndarray) -> WindowRows:
        """
        :param starts: (row, column) of the first step of every window, (B, 2)
        :return: their places
        """
        rows, columns = starts[:, :1], starts[:, 1:]
        steps = self.stride * np.arange(self.horizon)
        ahead = np.minimum(steps, self.to_end[rows, columns])
        behind = np.minimum(np.arange(self.history - 1, -1, -1), self.since_start[rows, columns])
        n = self.buffer.buffer_size
        return WindowRows((rows + ahead) % n, (rows - behind) % n, ahead < steps, columns)

    def take(self, array: Any, rows: np.ndarray, columns: np.ndarray) -> Any:
        """
        :param array: an array of the buffer, (buffer_size, n_envs, ...), or a dict of them
        :param rows: (B, n) rows
        :param columns: (B, 1) columns
        :return: the entries, (B, n, ...)
        """
        return tree_map(lambda x: x[rows, columns], array)


def _chronological_rows(buffer: ReplayBuffer) -> np.ndarray:
    """Numbers of the filled rows, the oldest first."""
    if not buffer.full:
        return np.arange(buffer.pos)
    # with one array for both, the row at the write position holds the successor of the newest step
    skipped = int(buffer.optimize_memory_usage)
    return (buffer.pos + np.arange(skipped, buffer.buffer_size)) % buffer.buffer_size


def discounted_returns(rewards: np.ndarray, ends: np.ndarray, gamma: float) -> np.ndarray:
    """
    Discounted return from every step to the end of its trajectory.

    :param rewards: (T, n_envs), in the order of time
    :param ends: (T, n_envs), whether a trajectory ends with the step
    :param gamma: discount factor
    :return: (T, n_envs)
    """
    returns = rewards.astype(np.float64)
    for t in range(len(returns) - 2, -1, -1):
        returns[t] += gamma * np.where(ends[t], 0.0, returns[t + 1])
    return returns
