"""The buffer that stores every frame once gives the batches that SB3's gives, in less memory."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_consistency import CPQL, FrameReplayBuffer
from sb3_consistency.data.frames import shift
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.resume.run_state import buffer_state, restore_buffer
from tests.conftest import SMALL, VectorEnv, make_arrays

ROOT = Path(__file__).parents[1]
IMAGE = spaces.Box(0, 255, (3, 12, 12), np.uint8)
SPACES = {
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "image": IMAGE,
    "dict": spaces.Dict({"image": IMAGE, "state": spaces.Box(-1, 1, (2,), np.float32)}),
    "discrete": spaces.Discrete(7),
}
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)


def sample(space, n, rng):
    if isinstance(space, spaces.Dict):
        return {key: sample(entry, n, rng) for key, entry in space.spaces.items()}
    if isinstance(space, spaces.Discrete):
        return rng.integers(0, space.n, n)
    if space.dtype == np.uint8:
        return rng.integers(0, 255, (n, *space.shape), dtype=np.uint8)
    return rng.uniform(-1, 1, (n, *space.shape)).astype(space.dtype)


def replaced(now, new, where):
    """Observations of which some environments' are new."""
    if isinstance(now, dict):
        return {key: replaced(now[key], new[key], where) for key in now}
    now = now.copy()
    now[where] = new[where]
    return now


def fill_both(ours, theirs, space, n_steps, n_envs, rng, done_share=0.2, cut_share=0.05):
    now = sample(space, n_envs, rng)
    for _ in range(n_steps):
        following = sample(space, n_envs, rng)
        done, timeout = rng.uniform(size=(2, n_envs)) < done_share
        step = (
            rng.uniform(-1, 1, (n_envs, 2)),
            rng.normal(size=n_envs),
            done,
            [{"TimeLimit.truncated": bool(d and t)} for d, t in zip(done, timeout, strict=True)],
        )
        for buffer in (ours, theirs):
            buffer.add(now, following, *step)
        # a reset after an end, and sometimes one that no flag marks, or that is marked afterwards
        cut, marked = rng.uniform(size=(2, n_envs)) < cut_share
        for buffer in (ours, theirs):
            for array in (buffer.dones, buffer.timeouts):
                array[buffer.pos - 1, cut & marked & ~done] = 1
        now = replaced(following, sample(space, n_envs, rng), done | cut)


def assert_same_batches(ours, theirs, n=200):
    assert (ours.size(), ours.pos, ours.full) == (theirs.size(), theirs.pos, theirs.full)
    for seed in range(3):
        batches = []
        for buffer in (ours, theirs):
            np.random.seed(seed)
            batches.append(buffer.sample(n))
        for a, b in zip(*batches, strict=True):
            if isinstance(a, dict):
                assert all(th.equal(a[key], b[key]) for key in b)
            elif a is not None:
                assert th.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("n_steps", [1, 13, 40, 41, 93])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", SPACES)
def test_batches_are_those_of_sb3(kind, mapped, n_envs, n_steps, tmp_path):
    space = SPACES[kind]
    cls = DictReplayBuffer if kind == "dict" else ReplayBuffer
    ours = FrameReplayBuffer(40 * n_envs, space, ACTIONS, n_envs=n_envs, folder=tmp_path if mapped else None)
    theirs = cls(40 * n_envs, space, ACTIONS, n_envs=n_envs)
    fill_both(ours, theirs, space, n_steps, n_envs, np.random.default_rng(0))
    assert_same_batches(ours, theirs)
    assert_same_batches(pickle.loads(pickle.dumps(ours)), theirs)
    # read as a dataset it has the same episodes
    sources = [open_dataset(buffer) for buffer in (ours, theirs)]
    assert sources[0].lengths.tolist() == sources[1].lengths.tolist()
    for a, b in zip(*(source.episodes(range(len(source.lengths))) for source in sources), strict=True):
        assert (a.truncations == b.truncations).all() and (a.rewards == b.rewards).all()


@pytest.mark.parametrize("n_steps", [1, 13, 301])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_checkpoint_has_the_filled_rows_and_is_continued_from_in_files_of_its_own(mapped, n_steps, tmp_path):
    def new(n=300):
        return FrameReplayBuffer(n, IMAGE, ACTIONS, folder=tmp_path if mapped else None)

    ours, theirs, rng = new(), ReplayBuffer(300, IMAGE, ACTIONS), np.random.default_rng(0)
    fill_both(ours, theirs, IMAGE, n_steps, 1, rng)
    state = pickle.loads(pickle.dumps(buffer_state(ours)))
    assert len(state["content"]["frames"][""]) == min(n_steps, 300)
    del ours
    assert not list(tmp_path.iterdir())
    continued = restore_buffer(SimpleNamespace(n_envs=1, new_buffer=new), state)
    assert_same_batches(continued, theirs)
    # so many ends of episodes that the side table grows
    fill_both(continued, theirs, IMAGE, 300, 1, rng, 1.0)
    assert_same_batches(continued, theirs)
    assert len(continued.finals[""]) == 2
    assert isinstance(continued.frames[""], np.memmap) == mapped


@given(
    seed=st.integers(0, 1000), size=st.integers(1, 12), n_steps=st.integers(1, 40), ends=st.floats(0, 1), cuts=st.floats(0, 1)
)
@settings(max_examples=60, deadline=None)
def test_any_ends_and_cuts(seed, size, n_steps, ends, cuts):
    ours, theirs = (cls(size, SPACES["vector"], ACTIONS) for cls in (FrameReplayBuffer, ReplayBuffer))
    fill_both(ours, theirs, SPACES["vector"], n_steps, 1, np.random.default_rng(seed), ends, cuts)
    assert_same_batches(ours, theirs, 50)
    # the side table holds no more than there are ends in the buffer
    used = ours.final_slot[ours.final_slot >= 0]
    assert len(set(used)) == len(used) and len(used) + len(ours._free) == 256 * len(ours.finals[""])


class Frames(VectorEnv):
    """Images that say which episode and step they are of."""

    def __init__(self):
        super().__init__(spaces.Box(0, 255, (36, 36, 1), np.uint8), length=7)
        self.episode = 0

    def reset(self, **kwargs):
        self.episode += 1
        return np.full_like(super().reset(**kwargs)[0], 10 * self.episode % 250), {}

    def step(self, action):
        obs, *rest = super().step(action)
        return np.full_like(obs, 10 * self.episode % 250 + self.t), *rest


def test_stacks_are_put_together_as_vec_frame_stack_does(tmp_path):
    models = []
    for kwargs in ({}, {"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"n_stack": 4, "folder": tmp_path}}):
        env = VecFrameStack(make_vec_env(Frames, n_envs=2, seed=0), 4)
        model = CPQL("CnnPolicy", env, buffer_size=60, learning_starts=10**6, seed=0, n_steps=1, device="cpu", **kwargs)
        model.learn(50)  # 25 rows of 30: episodes of 7 steps
        models.append(model)
    theirs, ours = (model.replay_buffer for model in models)
    assert_same_batches(ours, theirs)
    assert ours.frames[""].shape[2:] == (1, 36, 36)
    # learn() again starts anew, where no flag marks an end
    for model in models:
        model.learn(8)
    assert_same_batches(ours, theirs)
    for model in models:
        model.learn(30)
    rows = np.arange(ours.pos + 3, ours.pos + 30) % 30  # the frames before the three oldest are overwritten
    for column in (0, 1):
        columns = np.full(len(rows), column)
        np.testing.assert_array_equal(ours.observations_at(rows, columns), theirs.observations[rows, columns])
        np.testing.assert_array_equal(ours.next_observations_at(rows, columns), theirs.next_observations[rows, columns])
    sampled = ours.sample(300).observations
    assert sampled.shape == (300, 4, 36, 36)


def image_arrays(n_episodes=6, length=11):
    arrays = make_arrays(n_episodes=n_episodes, length=length, action_dim=2)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (n_episodes, length + 1, 36, 36, 3), dtype=np.uint8)
    arrays["observations"] = images[:, :-1].reshape(-1, 36, 36, 3)
    arrays["next_observations"] = images[:, 1:].reshape(-1, 36, 36, 3)
    return arrays


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("block_bytes", [10_000, 10**6])
def test_offline_data_is_that_of_sb3s_buffer(n_envs, block_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr("sb3_consistency.data.flat.BLOCK_BYTES", block_bytes)
    buffers = []
    for kwargs in ({}, {"replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"folder": tmp_path}}):
        env = make_vec_env(lambda: VectorEnv(spaces.Box(0, 255, (36, 36, 3), np.uint8)), n_envs=n_envs)
        model = CPQL("CnnPolicy", env, buffer_size=50, n_steps=1, **kwargs, **{**SMALL, "batch_size": 8})
        model.load_dataset(image_arrays(), episodes=[0, 1, 3, 5])
        buffers.append(model.replay_buffer)
    theirs, ours = buffers
    assert_same_batches(ours, theirs)
    model.pretrain(2)
    # online experience follows; the offline data stays
    model.learn(2 * n_envs)
    assert model.offline_buffer is ours and type(model.replay_buffer) is FrameReplayBuffer
    assert_same_batches(ours, theirs)


def test_files_go_with_the_buffer(tmp_path):
    buffer = FrameReplayBuffer(10, IMAGE, ACTIONS, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    del buffer
    assert not list(tmp_path.iterdir())


def test_shifted_images_keep_their_content():
    images = np.arange(2 * 3 * 8 * 9, dtype=np.int64).reshape(2, 3, 8, 9)
    np.random.seed(0)
    moved = shift(np.repeat(images, 150, axis=0), 2)
    assert moved.shape == (300, 3, 8, 9)
    padded = np.pad(images, [(0, 0), (0, 0), (2, 2), (2, 2)], mode="edge")
    found = set()
    for i, image in enumerate(moved):
        windows = {(y, x): padded[i // 150, :, y : y + 8, x : x + 9] for y in range(5) for x in range(5)}
        here = [at for at, window in windows.items() if (window == image).all()]
        assert len(here) == 1
        found.add(here[0])
    assert len(found) == 25


def test_sampled_images_are_shifted_and_vectors_are_not():
    buffer = FrameReplayBuffer(20, SPACES["dict"], ACTIONS, random_shift=4)
    other = DictReplayBuffer(20, SPACES["dict"], ACTIONS)
    fill_both(buffer, other, SPACES["dict"], 20, 1, np.random.default_rng(0))
    batch = buffer.sample(50)
    assert batch.observations["image"].shape == (50, 3, 12, 12)
    states = {tuple(x) for x in other.observations["state"][:, 0]}
    assert all(tuple(x) in states for x in batch.observations["state"].numpy())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"optimize_memory_usage": True}, "optimize_memory_usage"),
        ({"n_stack": 0}, "n_stack must be at least 1"),
        ({"n_stack": 2}, "is no stack of so many frames"),
        ({"random_shift": -1}, "random_shift"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FrameReplayBuffer(10, IMAGE, ACTIONS, **kwargs)


def large_files(*arguments):
    run = [sys.executable, "-m", "tests.large_files", *map(str, arguments)]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(result.stdout) if arguments[0] == "load" else None


def test_memory(tmp_path):
    path = tmp_path / "images.hdf5"
    large_files("write", path, 5_000)
    # 101 MiB of images, and what a block and a batch take
    assert large_files("load", path, "memory")["share"] < 1.5
    assert large_files("load", path, "mapped")["MiB"] < 60


@pytest.mark.slow
def test_memory_of_a_hundred_thousand_images(tmp_path):
    path = tmp_path / "images.hdf5"
    large_files("write", path, 100_000)
    found = {kind: large_files("load", path, kind) for kind in ("memory", "mapped", "sb3")}
    print(found)
    assert found["memory"]["share"] < 1.1 and found["mapped"]["MiB"] < 400
    assert len({each["batches"] for each in found.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halfcheetah_medium-v2.hdf5", "cheetah-x-v0.npz"])
def test_a_million_transitions(name, tmp_path):
    large_files("write", tmp_path / name, 1_000_000)
    found = large_files("load", tmp_path / name, "sb3")
    print(found)
    assert found["share"] < 1.3
