"""Buffers: offline data and experience, each batch's share of both, files, buffers of one's own."""

from copy import deepcopy

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_consistency import CPQL, ConsistencyBC
from sb3_consistency.training import algorithm as training
from sb3_consistency.training.batches import bytes_per_transition
from tests.conftest import ONLINE, SMALL, VectorEnv, actor_critics, box_env, make, make_arrays, online
from tests.test_loading import GoalEnv


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.25, 8), (1.0, 32), (0.0, 0), (lambda progress: progress, 16), (None, None)]
)
def test_offline_fraction(fraction, expected):
    model = make(CPQL, offline_fraction=fraction)
    model.pretrain(1)
    model.learn(120)
    model._current_progress_remaining = 0.5
    offline_ids = set(make_arrays()["observations"][:, 0].tolist())
    counts = []
    for batch in model.batches(200, 32):
        counts.append(sum(x in offline_ids for x in batch.observations[:, 0].tolist()))
    if expected is None:
        assert np.mean(counts) == pytest.approx(16, abs=3)  # 120 offline, 120 online transitions
    else:
        assert set(counts) == {expected}


def test_schedules_are_clipped_to_shares():
    model = make(CPQL, offline_fraction=lambda progress: 1.5)
    model.pretrain(1)
    model.learn(3)
    assert len(next(model.batches(1, 8)).rewards) == 8


def test_one_buffer_if_offline_data_need_not_be_kept():
    model = make(CPQL, keep_offline=False, buffer_size=130)
    model.pretrain(1)
    buffer = model.replay_buffer
    model.learn(20)
    assert model.offline_buffer is None and model.replay_buffer is buffer and buffer.full and buffer.pos == 10


def test_one_buffer_stays_one_when_learning_continues():
    model = CPQL("MlpPolicy", box_env(), dataset=make_arrays(), keep_offline=False, **SMALL)
    model.learn(10)
    model.learn(10)
    assert model.offline_buffer is None and model.replay_buffer.size() == 140


def test_bigger_batches_and_chunks_see_every_row():
    model = make(ConsistencyBC)
    seen = {x for batch in model.batches(130, 32) for x in batch.observations[:, 0].tolist()}
    assert len(seen) == 120


def test_large_observations_are_sampled_in_small_chunks(monkeypatch):
    image = spaces.Box(0, 255, (3, 84, 84), np.uint8)
    assert bytes_per_transition(image) == 2 * 3 * 84 * 84
    assert bytes_per_transition(spaces.Dict(a=image, b=spaces.Box(-1, 1, (2,), np.float32))) == 2 * (3 * 84 * 84 + 8)
    model = make(ConsistencyBC)
    drawn = []
    monkeypatch.setattr(model.data, "sample", lambda n, size: drawn.append(n) or [None] * n)
    list(model.batches(100, 32))
    monkeypatch.setattr(training, "CHUNK_BYTES", 5 * 32 * bytes_per_transition(model.observation_space))
    list(model.batches(12, 32))
    monkeypatch.setattr(training, "CHUNK_BYTES", 1)
    list(model.batches(2, 32))
    assert drawn == [64, 36, 5, 5, 2, 1, 1]


class WithoutReplacement(ReplayBuffer):
    def sample(self, batch_size, env=None):
        sizes.append(batch_size)
        return self._get_samples(np.random.choice(self.size(), batch_size, replace=False), env=env)


sizes = []


def test_own_buffers_are_asked_for_one_batch_at_a_time():
    sizes.clear()
    options = {**ONLINE, "learning_starts": 8, "batch_size": 8, "gradient_steps": 4, "replay_buffer_class": WithoutReplacement}
    model = CPQL("MlpPolicy", VectorEnv(), **options).learn(12)
    assert model.n_updates == 4 * 4 and set(sizes) == {8}
    model.load_dataset(make_arrays(action_dim=2))
    model.pretrain(10)
    assert max(sizes) == 8, "both buffers share a batch"


@actor_critics
def test_memory_efficient_buffer_online(cls):
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = online(cls, buffer_size=20, **kwargs).learn(50)  # wraps around
    assert model.replay_buffer.full and model.n_updates > 30
    with pytest.raises(ValueError, match="DictReplayBuffer"):
        online(cls, GoalEnv(), "MultiInputPolicy", **kwargs)


# files


@actor_critics
def test_replay_buffers_are_saved_and_loaded(cls, tmp_path):
    for env, policy, kwargs in (
        (box_env(), "MlpPolicy", {}),
        (GoalEnv(), "MultiInputPolicy", {"replay_buffer_class": HerReplayBuffer}),
    ):
        model = online(cls, env, policy, **kwargs).learn(25)
        before = deepcopy(model.replay_buffer.rewards)
        model.save_replay_buffer(tmp_path / "buffer")
        fresh = online(cls, env, policy, **kwargs)
        fresh.load_replay_buffer(tmp_path / "buffer")
        np.testing.assert_array_equal(fresh.replay_buffer.rewards, before)
        fresh.learn(15, reset_num_timesteps=False)


def test_a_loaded_online_buffer_does_not_replace_the_offline_data(tmp_path):
    model = make(CPQL)
    model.pretrain(1)
    model.learn(12)
    model.save_replay_buffer(tmp_path / "online.pkl")
    resumed = make(CPQL)
    resumed.load_replay_buffer(tmp_path / "online.pkl")
    assert resumed.offline_buffer.size() == 120 and resumed.replay_buffer.size() == 12
    resumed.learn(5)
    assert resumed.replay_buffer.size() == 17


def test_a_saved_buffer_of_offline_data_is_offline_data_again(tmp_path):
    model = CPQL("MlpPolicy", box_env(), buffer_size=500, **SMALL)
    model.load_dataset([make_arrays(), make_arrays(n_episodes=2, seed=1)], weights=[1, 3])
    model.pretrain(2).save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "data.pkl")
    assert not hasattr(model.replay_buffer, "offline_segments")
    loaded = CPQL.load(tmp_path / "model", env=box_env())
    loaded.load_replay_buffer(tmp_path / "data.pkl")
    assert loaded.data.buffer is loaded.replay_buffer and loaded.data.segments == model.data.segments
    loaded.learn(5)
    assert loaded.offline_buffer.size() == 160
    assert (loaded.replay_buffer.size(), loaded.replay_buffer.buffer_size) == (5, 500)
    loaded.save_replay_buffer(tmp_path / "online.pkl")
    loaded.load_replay_buffer(tmp_path / "online.pkl")
    assert loaded.offline_buffer.size() == 160 and loaded.replay_buffer.size() == 5
    loaded.replay_buffer = None
    with pytest.raises(AssertionError, match="replay buffer is not defined"):  # SB3's
        loaded.save_replay_buffer(tmp_path / "none.pkl")
