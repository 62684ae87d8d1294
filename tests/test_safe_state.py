"""Replay buffers and VecNormalize as files that execute nothing: equal after loading, refused when damaged."""

import os
import pickle
import warnings

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency import CPQL, ConsistencyBC, DatasetError, FrameReplayBuffer
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.data.safe_state import BufferFile, load_vec_normalize, save_buffer, save_vec_normalize
from tests import corruption
from tests.conftest import SMALL, VectorEnv, make_arrays
from tests.test_frames import ACTIONS, SPACES, assert_same_batches, fill_both
from tests.test_loading import GoalEnv
from tests.test_safe import Canary

BUFFERS = {
    "plain": (ReplayBuffer, "vector", {}),
    "images": (ReplayBuffer, "image", {}),
    "dict": (DictReplayBuffer, "dict", {}),
    "n-step": (NStepReplayBuffer, "vector", {"n_steps": 3, "gamma": 0.9}),
    "memory-efficient": (ReplayBuffer, "vector", {"optimize_memory_usage": True, "handle_timeout_termination": False}),
    "frames": (FrameReplayBuffer, "image", {}),
    "frames of a dict": (FrameReplayBuffer, "dict", {}),
}


@pytest.mark.parametrize("n_steps", [5, 20, 47])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_come_back_as_they_were(name, n_envs, n_steps, tmp_path):
    cls, space, kwargs = BUFFERS[name]
    buffer, again, other = (cls(20 * n_envs, SPACES[space], ACTIONS, n_envs=n_envs, **kwargs) for _ in range(3))
    fill_both(buffer, other, SPACES[space], n_steps, n_envs, np.random.default_rng(0))
    path = save_buffer(buffer, tmp_path / "buffer", segments=[[0, 5, 1.0]])
    file = BufferFile(path)
    assert path.name == "buffer.safetensors" and file.description["segments"] == [[0, 5, 1.0]]
    file.fill(again)
    assert_same_batches(again, buffer)
    # and it goes on as it would have
    for one in (buffer, again):
        fill_both(one, other, SPACES[space], 9, n_envs, np.random.default_rng(1))
    assert_same_batches(again, buffer)


@pytest.mark.parametrize("n_steps", [5, 47])
@pytest.mark.parametrize("name", BUFFERS)
def test_as_a_dataset_it_has_the_buffers_episodes(name, n_steps, tmp_path):
    cls, space, kwargs = BUFFERS[name]
    buffer, other = (cls(40, SPACES[space], ACTIONS, n_envs=2, **kwargs) for _ in range(2))
    fill_both(buffer, other, SPACES[space], n_steps, 2, np.random.default_rng(0))
    ours, theirs = open_dataset(save_buffer(buffer, tmp_path / "buffer.safetensors")), open_dataset(buffer)
    assert ours.lengths.tolist() == theirs.lengths.tolist() and ours.action_space == theirs.action_space
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-6)
    for a, b in zip(*(s.episodes(range(len(s.lengths))) for s in (ours, theirs)), strict=True):
        for key in ("actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
        for key in ("observations", "next_observations"):
            x, y = getattr(a, key), getattr(b, key)
            for entry in x if isinstance(x, dict) else [None]:
                np.testing.assert_array_equal(x if entry is None else x[entry], y if entry is None else y[entry])


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_others_may_read_it_where_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        path = save_buffer(ReplayBuffer(20, SPACES["vector"], ACTIONS), tmp_path / "buffer")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in tmp_path.iterdir()] == ["buffer.safetensors"]


def test_a_model_trains_on_it(tmp_path):
    model = CPQL("MlpPolicy", VectorEnv(), **SMALL)
    model.learn(60)
    path = save_buffer(model.replay_buffer, tmp_path / "buffer")
    clone = ConsistencyBC("MlpPolicy", VectorEnv(), dataset=str(path), **SMALL)
    assert clone.load_dataset(path) == 60
    clone.pretrain(2)


@pytest.mark.parametrize("cls", [CPQL, ConsistencyBC])
def test_a_model_saves_and_loads_it(cls, tmp_path):
    model = cls("MlpPolicy", VectorEnv(), buffer_size=100, **SMALL)
    model.load_dataset([make_arrays(action_dim=2), make_arrays(action_dim=2, seed=1)], weights=[1, 3])
    model.save_replay_buffer(tmp_path / "offline.safetensors")
    other = cls("MlpPolicy", VectorEnv(), buffer_size=100, **SMALL)
    other.load_replay_buffer(tmp_path / "offline.safetensors")
    assert other.data.in_replay and other.data.segments == model.data.segments
    assert_same_batches(other.replay_buffer, model.replay_buffer)
    other.pretrain(2)
    before = other.replay_buffer
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "offline.safetensors").read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"broken\.safetensors"):
        other.load_replay_buffer(tmp_path / "broken.safetensors")
    assert other.replay_buffer is before and other.data.in_replay


def test_pickles_are_warned_of_once(tmp_path):
    model = CPQL("MlpPolicy", VectorEnv(), buffer_size=100, **SMALL)
    model.learn(20)
    model.save_replay_buffer(tmp_path / "buffer.safetensors")
    save_to_pkl(tmp_path / "buffer.pkl", model.replay_buffer)  # as another process would
    model.save_replay_buffer(tmp_path / "own")
    with pytest.warns(UserWarning, match=r"buffer\.pkl is a pickle: .*save_replay_buffer\('buffer\.safetensors'\)"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model.load_replay_buffer(tmp_path / "buffer.pkl")
            open_dataset(tmp_path / "buffer.pkl")
        for name in ("buffer.safetensors", "own"):
            model.load_replay_buffer(tmp_path / name)
        model.load_dataset(tmp_path / "buffer.safetensors")
    os.utime(tmp_path / "own.pkl")  # replaced, perhaps
    with pytest.warns(UserWarning, match="own is a pickle"):
        model.load_replay_buffer(tmp_path / "own")
    # as an error it comes before the code does
    canary = tmp_path / "canary"
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Canary(canary)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for load in (model.load_replay_buffer, open_dataset):
            with pytest.raises((UserWarning, DatasetError), match="is a pickle"):
                load(tmp_path / "bad.pkl")
    assert not canary.exists()


def test_online_experience_of_another_number_of_environments(tmp_path):
    model = CPQL("MlpPolicy", make_vec_env(VectorEnv, n_envs=2), buffer_size=100, **SMALL)
    model.learn(40)
    model.save_replay_buffer(str(tmp_path / "online.safetensors"))
    again = CPQL("MlpPolicy", make_vec_env(VectorEnv, n_envs=2), buffer_size=10, **SMALL)
    again.load_replay_buffer(str(tmp_path / "online.safetensors"))
    assert_same_batches(again.replay_buffer, model.replay_buffer)
    again.learn(6, reset_num_timesteps=False)
    with pytest.raises(DatasetError, match="n_envs is 2 in the file, 1 here"):
        CPQL("MlpPolicy", VectorEnv(), **SMALL).load_replay_buffer(tmp_path / "online.safetensors")


def test_her(tmp_path):
    model = CPQL("MultiInputPolicy", GoalEnv(), replay_buffer_class=HerReplayBuffer, buffer_size=100, **SMALL)
    model.learn(45)
    path = save_buffer(model.replay_buffer, tmp_path / "buffer")
    again = model.new_buffer(100)
    BufferFile(path).fill(again)
    for key in ("ep_start", "ep_length", "_current_ep_start"):
        np.testing.assert_array_equal(getattr(again, key), getattr(model.replay_buffer, key))
    assert_same_batches(again, model.replay_buffer, 30)


def test_another_buffer_is_refused(tmp_path):
    buffer, other = (ReplayBuffer(20, SPACES["vector"], ACTIONS) for _ in range(2))
    fill_both(buffer, other, SPACES["vector"], 7, 1, np.random.default_rng(0))
    file = BufferFile(save_buffer(buffer, tmp_path / "buffer"))
    for wrong, message in (
        (ReplayBuffer(30, SPACES["vector"], ACTIONS), "rows is 20 in the file, 30 here"),
        (ReplayBuffer(40, SPACES["vector"], ACTIONS, n_envs=2), "n_envs is 1 in the file, 2 here"),
        (NStepReplayBuffer(20, SPACES["vector"], ACTIONS), "class is ReplayBuffer in the file"),
        (ReplayBuffer(20, spaces.Box(-1, 1, (4,)), ACTIONS), r"observations is \(3,\) in the file, \(4,\) here"),
        (ReplayBuffer(20, SPACES["vector"], spaces.Box(-1, 1, (1,))), "actions is"),
        (FrameReplayBuffer(20, SPACES["vector"], ACTIONS), "class is ReplayBuffer in the file"),
    ):
        with pytest.raises(DatasetError, match=message):
            file.fill(wrong)
        assert wrong.size() == 0


def vec_normalize(make=VectorEnv, **kwargs):
    return VecNormalize(make_vec_env(make, n_envs=2, seed=0), gamma=0.95, clip_obs=5.0, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"norm_obs": False}, {"norm_reward": False}, {"make": GoalEnv, "norm_obs_keys": ["observation"]}]
)
def test_vec_normalize_comes_back_as_it_was(kwargs, tmp_path):
    env = vec_normalize(**kwargs)
    env.reset()
    for _ in range(15):
        env.step(np.zeros((2, 2)))
    env.training = False
    path = save_vec_normalize(env, tmp_path / "statistics")
    again = load_vec_normalize(path, make_vec_env(kwargs.get("make", VectorEnv), n_envs=3, seed=0))
    assert not again.training and again.gamma == 0.95 and again.clip_obs == 5.0 and again.norm_obs == env.norm_obs
    np.testing.assert_array_equal(again.normalize_reward(np.arange(3.0)), env.normalize_reward(np.arange(3.0)))
    assert again.ret_rms.count == env.ret_rms.count
    observation = again.venv.reset()
    ours, theirs = again.normalize_obs(observation), env.normalize_obs(observation)
    for key in ours if isinstance(ours, dict) else [None]:
        np.testing.assert_array_equal(ours if key is None else ours[key], theirs if key is None else theirs[key])


def test_statistics_of_other_observations_are_refused(tmp_path):
    path = save_vec_normalize(vec_normalize(), tmp_path / "statistics")
    wide = make_vec_env(lambda: VectorEnv(spaces.Box(-1, 1, (5,), np.float32)))
    with pytest.raises(DatasetError, match=r"shape \(3,\), the environment's \(5,\)"):
        load_vec_normalize(path, wide)
    with pytest.raises(DatasetError, match="does not suit the environment"):
        load_vec_normalize(path, make_vec_env(GoalEnv))
    with pytest.raises(DatasetError, match="no replay buffer that was saved without pickle"):
        BufferFile(path)


def damaged(tmp_path, write):
    data = write(tmp_path / "intact").read_bytes()
    yield from corruption.damaged_bytes(data, n_offsets=20)
    for position in np.linspace(0, 0.999, 40):
        yield f"one bit at {position:.2f}", corruption.flip_bit(data, int(position * len(data)))


def test_damaged_files_are_refused(tmp_path):
    buffer, other = (FrameReplayBuffer(20, SPACES["dict"], ACTIONS) for _ in range(2))
    fill_both(buffer, other, SPACES["dict"], 15, 1, np.random.default_rng(0))
    path = tmp_path / "broken.safetensors"
    for name, content in damaged(tmp_path, lambda path: save_buffer(buffer, path)):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"broken\.safetensors"):
            pytest.fail(f"{name}: {BufferFile(path).description}")
    for name, content in damaged(tmp_path, lambda path: save_vec_normalize(vec_normalize(), path)):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"broken\.safetensors"):
            pytest.fail(f"{name}: {load_vec_normalize(path, make_vec_env(VectorEnv))}")
    with pytest.raises(DatasetError, match="no such file"):
        BufferFile(tmp_path / "missing.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    buffer, other = (ReplayBuffer(20, SPACES["vector"], ACTIONS) for _ in range(2))
    fill_both(buffer, other, SPACES["vector"], 7, 1, np.random.default_rng(0))
    path = save_buffer(buffer, tmp_path / "buffer")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_buffer(buffer, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
