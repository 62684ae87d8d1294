"""Windows of trajectories: consecutive steps of one episode, padding, strides, returns, targets of chunks."""

from itertools import pairwise

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_consistency.data.buffer import Segment
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.training.windows import Windows, chunk_batch, discounted_returns


def filled_buffer(n_rows, size, n_envs=1, episode=7, **kwargs):
    """Observation and action tell environment and time: 1000 env + step. Every ``episode`` steps one ends."""
    box = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    buffer = ReplayBuffer(size * n_envs, box, spaces.Box(-1e4, 1e4, (1,), np.float32), "cpu", n_envs, **kwargs)
    for t in range(n_rows):
        tag = (1000 * np.arange(n_envs) + t).astype(np.float32)
        done = np.array([(t + 2 * e) % episode == episode - 1 for e in range(n_envs)])
        buffer.add(tag[:, None], tag[:, None] + 1, tag[:, None], np.ones(n_envs), done, [{}] * n_envs)
    return buffer


def all_windows(windows):
    at = windows.at(windows.starts)
    return windows.take(windows.buffer.actions, at.rows, at.columns)[..., 0], at


@pytest.mark.parametrize(("n_rows", "size"), [(30, 30), (30, 40), (75, 30), (31, 30)])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("memory", [False, True])
def test_full_windows_are_consecutive_steps_of_one_episode(n_rows, size, n_envs, memory):
    buffer = filled_buffer(n_rows, size, n_envs, optimize_memory_usage=memory, handle_timeout_termination=not memory)
    windows = Windows(buffer, horizon=3, history=2, pad=False)
    values, at = all_windows(windows)
    oldest = max(0, n_rows - size + int(memory and n_rows >= size))
    expected = set()
    for env in range(n_envs):
        ends = [t for t in range(oldest, n_rows) if (t + 2 * env) % 7 == 6 or t == n_rows - 1]
        for first, last in pairwise([oldest - 1, *ends]):
            expected |= {tuple(1000 * env + t + i for i in range(3)) for t in range(first + 1, last - 1)}
    assert {tuple(v) for v in values.astype(int).tolist()} == expected and len(values) == len(expected)
    assert not at.padded.any()
    # the step before, or the first one again at the start of an episode
    past = windows.take(buffer.observations, at.past, at.columns)[..., 0]
    assert (past[:, 1] == values[:, 0]).all()
    t, env = values[:, 0] % 1000, values[:, 0] // 1000
    at_start = ((t + 2 * env) % 7 == 0) | (t == oldest)
    np.testing.assert_array_equal(past[:, 0], np.where(at_start, values[:, 0], values[:, 0] - 1))


def test_padding_repeats_the_last_step_of_the_episode():
    buffer = filled_buffer(14, 14)
    values, at = all_windows(Windows(buffer, horizon=3, history=1, pad=True))
    assert len(values) == 14
    assert values[5].tolist() == [5, 6, 6] and values[6].tolist() == [6, 6, 6] and values[7].tolist() == [7, 8, 9]
    assert at.padded[5].tolist() == [False, False, True] and not at.padded[7].any()


def test_windows_with_a_stride_hold_every_nth_step():
    buffer = filled_buffer(14, 14)
    values, _ = all_windows(Windows(buffer, horizon=3, history=1, pad=False, stride=2))
    assert values.tolist() == [[0, 2, 4], [1, 3, 5], [2, 4, 6], [7, 9, 11], [8, 10, 12], [9, 11, 13]]
    values, at = all_windows(Windows(buffer, horizon=3, history=1, pad=True, stride=2))
    assert len(values) == 14 and values[3].tolist() == [3, 5, 6] and at.padded[3].tolist() == [False, False, True]
    with pytest.raises(DatasetError, match=r"9 steps.*horizon=5, stride=2.*has 7"):
        Windows(buffer, horizon=5, history=1, pad=False, stride=2).check()


def test_short_episodes_need_padding():
    buffer = filled_buffer(14, 14)
    with pytest.raises(DatasetError, match=r"horizon=8.*has 7.*pad=True"):
        Windows(buffer, horizon=8, history=1, pad=False).check()
    assert len(Windows(buffer, horizon=8, history=1, pad=True)) == 14


def test_windows_of_weighted_datasets():
    buffer = filled_buffer(28, 28)
    windows = Windows(buffer, horizon=7, history=1, pad=False)
    np.random.seed(0)
    at = windows.sample(2000, [Segment(0, 14, 0.9), Segment(14, 28, 0.1)])
    assert set(at.rows[:, 0].tolist()) == {0, 7, 14, 21}
    assert (at.rows[:, 0] < 14).mean() == pytest.approx(0.9, abs=0.03)
    with pytest.raises(DatasetError, match="pad=True"):
        windows.sample(5, [Segment(0, 14, 0.5), Segment(22, 28, 0.5)])


def test_goal_changes_end_windows():
    vector = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    space = spaces.Dict({"observation": vector, "desired_goal": vector})
    buffer = DictReplayBuffer(10, space, spaces.Box(-1, 1, (1,)), "cpu")
    for t in range(10):
        obs = {"observation": np.full((1, 2), t), "desired_goal": np.full((1, 2), t // 4)}
        buffer.add(obs, obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    windows = Windows(buffer, 4, 2, False, "desired_goal")
    assert windows.starts[:, 0].tolist() == [0, 4]
    windows.pad = True
    at = windows.at(windows.starts)
    assert at.rows[2].tolist() == [2, 3, 3, 3] and at.past[3:6].tolist() == [[2, 3], [4, 4], [4, 5]]
    assert len(Windows(buffer, 4, 1, False)) == 7


def test_returns_stop_at_the_ends():
    rewards, ends = np.ones((5, 2)), np.zeros((5, 2), bool)
    ends[1, 0] = ends[4] = True
    returns = discounted_returns(rewards, ends, 0.5)
    np.testing.assert_allclose(returns[:, 0], [1.5, 1, 1.75, 1.5, 1])
    np.testing.assert_allclose(returns[:, 1], [1.9375, 1.875, 1.75, 1.5, 1])


@st.composite
def buffers(draw):
    """Episodes of any lengths that terminate, time out or still run, in any buffer; the observation tells env and time."""
    kind, n_envs = draw(st.sampled_from(["array", "one array", "frames"])), draw(st.integers(1, 2))
    n_rows, size = draw(st.integers(1, 25)), draw(st.integers(2, 15))
    box, kwargs = spaces.Box(-np.inf, np.inf, (1,), np.float32), {}
    if kind == "one array":
        kwargs = {"optimize_memory_usage": True, "handle_timeout_termination": False}
    buffer = (FrameReplayBuffer if kind == "frames" else ReplayBuffer)(size * n_envs, box, box, "cpu", n_envs, **kwargs)
    ends = draw(st.lists(st.sampled_from(["", "", "", "end", "time-out"]), min_size=n_rows * n_envs, max_size=n_rows * n_envs))
    steps = []
    for t in range(n_rows):
        tag = (1000 * np.arange(n_envs) + 2 * t).astype(np.float32)[:, None]
        end = ends[t * n_envs : (t + 1) * n_envs]
        rewards = np.random.default_rng(t).uniform(-1, 1, n_envs).astype(np.float32)
        infos = [{"TimeLimit.truncated": e == "time-out"} for e in end]
        # the next observation is the next one, or the last of an episode, an odd number
        after = tag + np.array([[1.0 if e or t == n_rows - 1 else 2.0] for e in end], np.float32)
        buffer.add(tag, after, tag, rewards, np.array([e != "" for e in end]), infos)
        steps.append([(t % size, end[e], rewards[e], tag[e, 0], after[e, 0]) for e in range(n_envs)])
    kept = steps[-(size - int(kind == "one array")) :] if n_rows >= size else steps
    return buffer, [list(column) for column in zip(*kept, strict=True)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(buffers(), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.integers(1, 2))
def test_windows_and_targets_of_chunks_equal_a_loop_over_episodes(made, horizon, history, pad, stride):
    buffer, columns = made
    windows = Windows(buffer, horizon, history, pad, stride=stride)
    expected, times_out = {}, buffer.handle_timeout_termination
    for column, steps in enumerate(columns):
        first = 0
        for last in range(len(steps)):
            if steps[last][1] == "" and last < len(steps) - 1:
                continue
            episode, first = steps[first : last + 1], last + 1
            for i in range(len(episode)):
                ahead = [min(i + k * stride, len(episode) - 1) for k in range(horizon)]
                padded = [i + k * stride > len(episode) - 1 for k in range(horizon)]
                if padded[-1] and not pad:
                    continue
                taken = [episode[j] for j, p in zip(ahead, padded, strict=True) if not p]
                final = episode[ahead[-1]]
                past = [episode[max(i - j, 0)][3] for j in range(history - 1, -1, -1)]
                before_final = [episode[max(ahead[-1] - j, 0)][3] for j in range(history - 2, -1, -1)]
                expected[episode[i][0], column] = {
                    "rows": [episode[j][0] for j in ahead],
                    "padded": padded,
                    "observations": past,
                    "actions": [episode[j][3] for j in ahead],
                    "rewards": [sum(0.9**k * step[2] for k, step in enumerate(taken))],
                    "discounts": [0.9 ** len(taken)],
                    "dones": [float(final[1] == "end" or (final[1] == "time-out" and not times_out))],
                    # with one array for both, what follows an episode's last step is lost
                    "next": [*before_final, final[4]] if times_out else None,
                }
    assert {tuple(start) for start in windows.starts.tolist()} == expected.keys() and len(windows) == len(expected)
    if not expected:
        with pytest.raises(DatasetError, match="pad=True"):
            windows.sample(3)
        return
    drawn = windows.sample(30)
    assert all((row, column) in expected for row, column in zip(drawn.rows[:, 0], drawn.columns[:, 0], strict=True))
    at = windows.at(windows.starts)
    batch = chunk_batch(windows, at, 0.9, None)
    for i, start in enumerate(windows.starts.tolist()):
        wanted = expected[tuple(start)]
        assert at.rows[i].tolist() == wanted["rows"] and at.padded[i].tolist() == wanted["padded"]
        for name in ("observations", "actions", "rewards", "discounts", "dones"):
            np.testing.assert_allclose(getattr(batch, name)[i].flatten(), wanted[name], rtol=1e-5, atol=1e-6)
        if wanted["next"] is not None:
            np.testing.assert_array_equal(batch.next_observations[i].flatten(), wanted["next"])


def test_few_full_windows_are_found():
    """One among thousands of steps: not met by chance."""
    box = spaces.Box(-1, 1, (1,), np.float32)
    buffer = ReplayBuffer(5000, box, box, "cpu")
    buffer.dones[:], buffer.full = 1, True
    buffer.dones[3001:3004] = 0
    assert set(Windows(buffer, horizon=4, pad=False).sample(64).rows[:, 0].tolist()) == {3001}
