"""Files that the formats' own libraries wrote, row by row, and their own readers where those are right."""

import os
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_consistency.data.opening import open_dataset
from tests import formats
from tests.formats import assert_is, read

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
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


def assert_is_what_robomimic_reads(folder):
    """Its reader's arrays; a demonstration terminates where it ends in a success, if that is asked for."""
    for name, with_next in (("low_dim", True), ("no_next_obs", False)):
        with np.load(folder / f"{name}.npz") as saved:
            theirs = dict(saved)
        assert theirs["names"].tolist() == ["demo_2", "demo_9", "demo_10", "demo_11"]
        for part, filtered in (("", ""), ("train/", "&filter=train")):
            assert_is_what_robomimic_reads_of(f"{folder}/{name}.hdf5", filtered, theirs, part, with_next)


def assert_is_what_robomimic_reads_of(path, filtered, theirs, part, with_next):
    lengths = theirs[f"{part}lengths"]
    last = np.zeros(sum(lengths), bool)
    last[np.cumsum(lengths) - 1] = True
    success = last & (theirs[f"{part}rewards"] > 0)
    for terminates in (True, False):
        kept = np.full(len(last), True) if with_next else ~last | (success & terminates)
        source = open_dataset(f"{path}?success_terminates={int(terminates)}{filtered}")
        blocks = list(source.blocks(range(len(source.lengths))))
        for ours, key in (("actions", "actions"), ("rewards", "rewards")):
            got = np.concatenate([getattr(block, ours) for block in blocks])
            np.testing.assert_array_equal(got, theirs[f"{part}{key}"][kept])
        terminations = np.concatenate([block.terminations for block in blocks])
        np.testing.assert_array_equal(terminations, success[kept] & terminates)
        for key in ("robot0_eef_pos", "object", "agentview_image"):
            observations, following = (
                np.concatenate([getattr(block, name)[key] for block in blocks])
                for name in ("observations", "next_observations")
            )
            np.testing.assert_array_equal(observations, theirs[f"{part}obs/{key}"][kept])
            # what a demonstration without next_obs ends with is the row after
            right = theirs[f"{part}next_obs/{key}"] if with_next else np.roll(theirs[f"{part}obs/{key}"], -1, axis=0)
            np.testing.assert_array_equal(following[~terminations], right[kept][~terminations])


def test_robomimics_own_files_are_read_as_its_own_reader_reads_them():
    """Written once, by the script that the README beside them names."""
    assert_is_what_robomimic_reads(DATA / "robomimic")


@pytest.fixture
def files_of(tmp_path):
    """Has a library write files, in an environment of its own: ``make libraries``."""

    def write(library):
        python = ROOT / f"build/{library}-venv/bin/python"
        if not python.exists():
            pytest.skip(f"there is no {python}: make libraries")
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([python, ROOT / f"tests/libraries/{library}_files.py", tmp_path], env=env, check=True)
        return tmp_path

    return write


@pytest.mark.slow
def test_robomimic_itself(files_of):
    assert_is_what_robomimic_reads(files_of("robomimic"))


@pytest.mark.slow
def test_lerobot_itself(files_of):
    pytest.importorskip("pyarrow")
    assert_is_what_lerobot_reads(files_of("lerobot"))


def assert_is_what_lerobot_reads(folder):
    """Its reader's rows, but the last of an episode that no success ends: its next observation is not in the file."""
    with np.load(folder / "lerobot.npz") as saved:
        theirs = dict(saved)
    episode = theirs["episode_index"]
    last = np.append(episode[1:] != episode[:-1], True)
    success = theirs["next.success"].reshape(-1)
    kept = ~last | success
    source = open_dataset(f"{folder}/lerobot?success_terminates=1")
    got = read(source)
    assert source.lengths.tolist() == np.bincount(episode[kept]).tolist()
    for ours, key in (("observations", "observation.state"), ("actions", "action"), ("rewards", "next.reward")):
        np.testing.assert_array_equal(got[ours], theirs[key][kept].reshape(got[ours].shape))
    np.testing.assert_array_equal(got["terminations"], success[kept])
    following = np.roll(theirs["observation.state"], -1, axis=0)[kept]
    np.testing.assert_array_equal(got["next_observations"][~success[kept]], following[~success[kept]])
    pytest.importorskip("av")
    camera = theirs["observation.images.top"]  # channels first, from 0 to 1
    source = open_dataset(f"{folder}/lerobot?success_terminates=1&videos=observation.images.top&size=64x96")
    frames = np.concatenate([b.observations["images_top"] for b in source.blocks(range(len(source.lengths)))])
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(frames, 255 * camera.transpose(0, 2, 3, 1)[kept], atol=3)


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
