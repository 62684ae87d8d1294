"""Files that the formats' own libraries wrote, row by row, and their own readers where those are right."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_consistency.data.opening import open_dataset
from tests import formats
from tests.formats import assert_is, read

DATA = Path(__file__).parent / "data"
WRITTEN = {
    "lerobot": ("lerobot?success_terminates=1", formats.SHIFTED),
    "d3rlpy": ("d3rlpy.h5", formats.SHIFTED),
    "imitation": ("imitation", formats.ALL),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_the_libraries_themselves(name):
    """Written once, by the versions that the README beside them names."""
    if name != "d3rlpy":
        pytest.importorskip("pyarrow")
    dataset, kept = WRITTEN[name]
    with np.load(DATA / "truth.npz") as truth:
        parts = [[truth[f"{name}_{key}{i}"] for key in "oar"] for i in range(3)]
    episodes = []
    for (observations, actions, rewards), terminated in zip(parts, (True, False, True), strict=True):
        if len(observations) == len(actions):  # the last observation is not in the file
            observations = np.concatenate([observations, observations[-1:]])
        episodes.append(formats.Truth(observations, actions, rewards, terminated))
    assert_is(open_dataset(f"{DATA}/{dataset}"), episodes, kept, True, True)


def qlearning_dataset(arrays):
    """D4RL's function of this name (d4rl/__init__.py), for files with time-outs and without next observations."""
    rows = []
    for i in range(len(arrays["rewards"]) - 1):
        if arrays["timeouts"][i]:
            continue
        rows.append(
            [arrays[key][j] for key, j in (("observations", i), ("actions", i), ("rewards", i), ("observations", i + 1))]
        )
        rows[-1].append(bool(arrays["terminals"][i]))
    keys = ("observations", "actions", "rewards", "next_observations", "terminations")
    return {key: np.array([row[k] for row in rows]) for k, key in enumerate(keys)}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=50, deadline=None)
def test_rows_are_those_of_d4rls_own_function(flags):
    """But for the last row of the file, which it leaves out even where it terminates, and what follows a termination."""
    terminals, timeouts = np.array(flags).T
    timeouts &= ~terminals
    rng, n = np.random.default_rng(0), len(flags)
    arrays = {"observations": rng.normal(size=(n, 3)), "actions": rng.uniform(-1, 1, (n, 2)), "rewards": rng.normal(size=n)}
    arrays.update(terminals=terminals, timeouts=timeouts)
    theirs = qlearning_dataset(arrays)
    if len(theirs["rewards"]) == 0:
        return
    ours = read(open_dataset(arrays))
    assert len(ours["rewards"]) == len(theirs["rewards"]) + int(terminals[-1])
    for key, right in theirs.items():
        used = ~theirs["terminations"] if key == "next_observations" else slice(None)
        np.testing.assert_array_equal(ours[key][: len(right)][used], right[used], err_msg=key)


@pytest.mark.parametrize("task", [None, "1", "default"])
def test_arrays_are_those_of_ogbenchs_own_loader(task, tmp_path):
    ogbench = pytest.importorskip("ogbench")
    env = gym.make("cube-single-v0")
    rows = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    for episode in range(3):
        observation, info = env.reset(seed=episode)
        for step in range(15):
            action = env.action_space.sample()
            values = (observation, action, step == 14, info["qpos"], info["qvel"])
            for key, value in zip(rows, values, strict=True):
                rows[key].append(value)
            observation, _, _, _, info = env.step(action)
    arrays = {key: np.array(value, np.float32 if key != "terminals" else bool) for key, value in rows.items()}
    for name in ("cube-single-play-v0.npz", "cube-single-play-v0-val.npz"):
        np.savez_compressed(tmp_path / name, **arrays)
    path = str(tmp_path / "cube-single-play-v0.npz")
    part = {None: "", "1": "-singletask-task1", "default": "-singletask"}[task]
    for compact in (False, True):
        name = f"cube-single-play{part}-v0"
        _, theirs, _ = ogbench.make_env_and_datasets(name, dataset_path=path, compact_dataset=compact)
        for source in (open_dataset(f"ogbench:{path}" + ("" if task is None else f"?task={task}")), open_dataset(theirs)):
            got = read(source)
            kept = theirs["valids"] == 1 if compact else slice(None)
            assert source.lengths.tolist() == [14, 14, 14]
            for key in ("observations", "actions", *(["rewards"] if task else []), *(["next_observations"] * (not compact))):
                np.testing.assert_array_equal(got[key], theirs[key][kept], err_msg=key)
            if task:
                np.testing.assert_array_equal(got["terminations"], theirs["masks"][kept] == 0)
    assert open_dataset(f"ogbench:{path}").make_env().spec.id == "cube-single-v0"
