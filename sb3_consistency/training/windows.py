"""Windows of trajectories, read out of a replay buffer by index arithmetic: the data stays where it is."""

from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.buffer import Segment
from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.training.batches import Batch, rewards_of_goals, tree_map

#: how often windows are drawn again that are not full, before all full ones are listed
REDRAWS = 20


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

    Nothing of the buffer is kept: where episodes end is looked up around the windows that are drawn, so it may grow.

    :param buffer: SB3 replay buffer; of one with hindsight only finished episodes have windows
    :param horizon: number H of steps that a window holds
    :param history: number h of observations up to its first step
    :param pad: whether a window may run past the end of its episode, where it repeats the last step; else windows are
        full, and the last (H - 1) ``stride`` steps of an episode start none
    :param goal_key: key of a Dict observation whose changes end a trajectory, too; None for none
    :param stride: a window holds every ``stride``-th step
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        horizon: int,
        history: int = 1,
        pad: bool = True,
        goal_key: str | None = None,
        stride: int = 1,
    ) -> None:
        self.buffer = buffer
        self.horizon = horizon
        self.history = history
        self.pad = pad
        self.goal_key = goal_key
        self.stride = stride

    # rows in the order of time

    def _filled(self) -> tuple[int, int]:
        """The oldest row that counts, and how many there are."""
        buffer = self.buffer
        if not buffer.full:
            return 0, buffer.pos
        # with one array for both, the row at the write position holds the successor of the newest step; of stacked frames,
        # those before the oldest rows are overwritten
        skipped = max(int(buffer.optimize_memory_usage), min(getattr(buffer, "n_stack", 1), buffer.buffer_size) - 1)
        return (buffer.pos + skipped) % buffer.buffer_size, buffer.buffer_size - skipped

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """
        :return: numbers of the filled rows, the oldest first, (T,), and whether a trajectory ends with them, (T, n_envs)
        """
        oldest, n_rows = self._filled()
        order = (oldest + np.arange(n_rows)) % self.buffer.buffer_size
        ends = self.buffer.dones[order].astype(bool)
        ends[-1:] = True
        if self.goal_key is not None:
            goals = self._goals(order)
            ends[:-1] |= (goals[1:] != goals[:-1]).reshape(max(n_rows - 1, 0), self.buffer.n_envs, -1).any(axis=-1)
        return order, ends

    def _goals(self, rows: np.ndarray, columns: Any = slice(None)) -> np.ndarray:
        observations: Any = self.buffer.observations
        goals: np.ndarray = observations[self.goal_key][rows, columns]
        return goals

    def _ends_at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Whether a trajectory ends with these steps, (B, n); the newest step's end is none of the buffer's."""
        ends: np.ndarray = self.buffer.dones[rows, columns] > 0
        if self.goal_key is not None:
            now, following = (self._goals(r, columns) for r in (rows, (rows + 1) % self.buffer.buffer_size))
            ends |= (now != following).any(axis=tuple(range(2, now.ndim)))
        return ends

    # which windows there are

    @property
    def starts(self) -> np.ndarray:
        """(row, column) of the first step of every window, ordered by row, (W, 2)."""
        order, ends = self.in_order()
        n_rows, steps = len(order), np.arange(len(order))[:, None]
        # last step of the trajectory that a step belongs to
        last = np.minimum.accumulate(np.where(ends, steps, n_rows)[::-1], axis=0)[::-1]
        valid = np.zeros((self.buffer.buffer_size, self.buffer.n_envs), bool)
        valid[order] = self.pad | (last - steps >= (self.horizon - 1) * self.stride)
        if isinstance(self.buffer, HerReplayBuffer):
            valid &= self.buffer.ep_length > 0
        return np.argwhere(valid)

    def __len__(self) -> int:
        return len(self.starts)

    def check(self) -> None:
        """
        :raises DatasetError: if there is no full window and ``pad`` is off
        """
        if len(self) == 0:
            _, ends = self.in_order()
            longest = max(np.diff(np.flatnonzero(column), prepend=-1).max(initial=0) for column in ends.T)
            raise DatasetError(
                f"No episode has the {(self.horizon - 1) * self.stride + 1} steps of a window (horizon={self.horizon}, "
                f"stride={self.stride}); the longest has {longest}: take a shorter horizon or stride, or pad=True."
            )

    # drawing

    def sample(self, size: int, segments: list[Segment] | None = None) -> WindowRows:
        """
        :param size: number of windows B
        :param segments: draw from these row ranges in their shares, instead of uniformly
        :return: their places
        :raises DatasetError: if there is no window, in the buffer or in a row range
        """
        limits = chosen = None
        if segments:
            limits = np.array([(s.start, s.stop) for s in segments])
            chosen = np.random.choice(len(segments), size=size, p=[segment.share for segment in segments])
        starts = self._any_rows(size, limits, chosen)
        at = self.at(starts)
        for _ in range(REDRAWS):
            wrong = self._no_windows(at)
            if len(wrong) == 0:
                return at
            starts[wrong] = self._any_rows(len(wrong), limits, None if chosen is None else chosen[wrong])
            at = self.at(starts)
        wrong = self._no_windows(at)
        if len(wrong) > 0:
            self._fill_from_list(starts, wrong, limits, chosen)
        return self.at(starts)

    def _no_windows(self, at: WindowRows) -> np.ndarray:
        """Which of these start no window."""
        wrong = np.zeros(len(at.rows), bool) if self.pad else at.padded[:, -1].copy()
        if isinstance(self.buffer, HerReplayBuffer):
            wrong |= self.buffer.ep_length[at.rows[:, 0], at.columns[:, 0]] == 0
        return np.flatnonzero(wrong)

    def _any_rows(self, size: int, limits: np.ndarray | None, chosen: np.ndarray | None) -> np.ndarray:
        """(row, column) of steps drawn at random, (B, 2)."""
        n_columns = self.buffer.n_envs
        if limits is not None:
            return np.stack(np.divmod(np.random.randint(*(n_columns * limits[chosen]).T), n_columns), axis=1)
        oldest, n_rows = self._filled()
        rows, columns = np.divmod(np.random.randint(n_rows * n_columns, size=size), n_columns)
        return np.stack([(oldest + rows) % self.buffer.buffer_size, columns], axis=1)

    def _fill_from_list(
        self, starts: np.ndarray, wrong: np.ndarray, limits: np.ndarray | None, chosen: np.ndarray | None
    ) -> None:
        """Where windows are too few to be met by chance: draw from the list of all."""
        self.check()
        full = self.starts
        within = np.tile([0, len(full)], (len(wrong), 1))
        if limits is not None and chosen is not None:
            within = np.searchsorted(full[:, 0], limits)[chosen[wrong]]
            if (within[:, 0] == within[:, 1]).any():
                raise DatasetError(
                    f"A dataset has no episode as long as a window (horizon={self.horizon}, stride={self.stride}): "
                    "pad=True uses shorter ones."
                )
        starts[wrong] = full[np.random.randint(*within.T)]

    # reading

    def at(self, starts: np.ndarray) -> WindowRows:
        """
        :param starts: (row, column) of the first step of every window, (B, 2)
        :return: their places
        """
        rows, columns = starts[:, :1], starts[:, 1:]
        oldest, n_rows = self._filled()
        n = self.buffer.buffer_size
        time = (rows - oldest) % n
        steps = self.stride * np.arange(self.horizon)
        ended = self._ends_at((rows + np.arange(steps[-1])) % n, columns)
        to_end = np.minimum(_leading(~ended), n_rows - 1 - time)
        return WindowRows((rows + np.minimum(steps, to_end)) % n, self._past(rows, columns), steps > to_end, columns)

    def _past(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The h rows up to these, (B, h), for rows (B, 1)."""
        n, (oldest, _) = self.buffer.buffer_size, self._filled()
        ended = self._ends_at((rows - np.arange(1, self.history)) % n, columns)
        since_start = np.minimum(_leading(~ended), (rows - oldest) % n)
        return (rows - np.minimum(np.arange(self.history - 1, -1, -1), since_start)) % n

    def take(self, array: Any, rows: np.ndarray, columns: np.ndarray) -> Any:
        """
        :param array: an array of the buffer, (buffer_size, n_envs, ...), or a dict of them
        :param rows: (B, n) rows
        :param columns: (B, 1) columns
        :return: the entries, (B, n, ...)
        """
        return tree_map(lambda x: x[rows, columns], array)

    def observations(self, rows: np.ndarray, columns: np.ndarray) -> Any:
        """
        :param rows: (B, n) rows
        :param columns: (B, 1) columns
        :return: observations as the buffer holds them, (B, n, ...), or a dict of them
        """
        if isinstance(self.buffer, FrameReplayBuffer):
            flat = self.buffer.observations_at(rows.ravel(), np.broadcast_to(columns, rows.shape).ravel())
            return tree_map(lambda x: x.reshape(*rows.shape, *x.shape[1:]), flat)
        return self.take(self.buffer.observations, rows, columns)

    def next_observations(self, at: WindowRows) -> Any:
        """
        :param at: places of windows
        :return: what is seen after their last step, its history included, (B, h, ...), or a dict of them
        """
        buffer, last, columns = self.buffer, at.rows[:, -1:], at.columns
        if isinstance(buffer, FrameReplayBuffer):
            found = buffer.next_observations_at(last[:, 0], columns[:, 0])
            following = tree_map(lambda x: x[:, None], found)
        elif buffer.optimize_memory_usage:
            following = self.take(buffer.observations, (last + 1) % buffer.buffer_size, columns)
        else:
            following = self.take(buffer.next_observations, last, columns)
        if self.history == 1:
            return following
        past = self.observations(self._past(last, columns)[:, 1:], columns)
        return tree_map(lambda before, now: np.concatenate([before, now], axis=1), past, following)


def _leading(flags: np.ndarray) -> np.ndarray:
    """How many flags are set before the first that is not, (B, n) -> (B, 1)."""
    counts: np.ndarray = np.logical_and.accumulate(flags, axis=1).sum(axis=1, keepdims=True)
    return counts


def chunk_batch(windows: Windows, at: WindowRows, gamma: float, env: VecNormalize | None, augment: bool = True) -> Batch:
    """
    Transitions from the state before a chunk of actions to the one after it: what a critic of chunks learns from.

    Of the k = H steps of a chunk, or fewer where its episode ends: reward sum_{i<k} gamma^i r_i, discount gamma^k, and the
    k-th step's end and next observation. So a termination inside does not bootstrap; a time-out bootstraps where it is.

    Source: Li et al. 2025 (Q-chunking), equation 7, whose released code leaves out chunks that an episode's end cuts.

    :param windows: windows of a buffer
    :param at: their places
    :param gamma: discount factor of one step
    :param env: normalises observations and rewards
    :param augment: shift images at random, if the buffer has ``random_shift``
    :return: observations (B, ...), with a history (B, h, ...); chunks one action after the other, (B, H A)
    """
    buffer: Any = windows.buffer
    last = (at.rows[:, -1:], at.columns)
    powers = gamma ** np.arange(windows.horizon)
    observations, following = windows.observations(at.past, at.columns), windows.next_observations(at)
    rewards = buffer.rewards[at.rows, at.columns]
    if isinstance(buffer, HerReplayBuffer):
        _take_goals_in_hindsight(buffer, at, observations, following, rewards)
    rewards = buffer._normalize_reward(rewards, env)
    lengths = (~at.padded).sum(axis=1, keepdims=True)

    def tensors(observations: Any) -> Any:
        if augment:
            observations = augmented(buffer, observations)
        if windows.history == 1:
            observations = tree_map(lambda x: x[:, 0], observations)
        return tree_map(buffer.to_torch, buffer._normalize_obs(observations, env))

    def column(values: np.ndarray) -> Any:
        return buffer.to_torch(values.astype(np.float32))

    return Batch(
        tensors(observations),
        buffer.to_torch(buffer.actions[at.rows, at.columns]).float().flatten(1),
        tensors(following),
        column((rewards * powers * ~at.padded).sum(axis=1, keepdims=True)),
        column(buffer.dones[last] * (1 - buffer.timeouts[last])),
        column(gamma**lengths),
    )


def augmented(buffer: ReplayBuffer, observations: Any) -> Any:
    """
    :param buffer: a replay buffer
    :param observations: some of its observations, (B, h, ...), or a dict of them
    :return: the same, images shifted at random if it has ``random_shift``
    """
    return buffer._shifted(observations) if isinstance(buffer, FrameReplayBuffer) else observations


def _take_goals_in_hindsight(buffer: HerReplayBuffer, at: WindowRows, observations: Any, following: Any, rewards: Any) -> None:
    """
    In a share ``her_ratio`` of the windows, put a goal that the episode reached later in the place of the desired one, in all
    of their observations, and the rewards that the environment gives for it. As in SB3, ends of episodes stay.
    """
    chosen = np.flatnonzero(np.random.rand(len(at.rows)) < buffer.her_ratio)
    if len(chosen) == 0:
        return
    rows, columns = at.rows[chosen], at.columns[chosen]
    goals = buffer._sample_goals(rows[:, 0], columns[:, 0])
    for seen in (observations, following):
        seen["desired_goal"][chosen] = goals[:, None]
    achieved = buffer.next_observations["achieved_goal"][rows, columns]
    wanted = np.broadcast_to(goals[:, None], achieved.shape)
    infos = buffer.infos[rows, columns].ravel().tolist() if buffer.copy_info_dict else [{} for _ in range(rows.size)]
    one_by_one = (-1, *goals.shape[1:])
    rewards[chosen] = rewards_of_goals(buffer, achieved.reshape(one_by_one), wanted.reshape(one_by_one), infos).reshape(
        rows.shape
    )


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
