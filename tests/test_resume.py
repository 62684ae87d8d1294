"""Exact resume: a run that is killed and continued ends in the weights of the one that was not, bit for bit."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_consistency import (
    CPQL,
    RACTD,
    CapturableEnv,
    ConsistencyAC,
    ConsistencyBC,
    DiffusionQL,
    ResumableCheckpointCallback,
    load_latest,
)
from sb3_consistency.resume.callback import load_checkpoint
from tests.conftest import VectorEnv, leaves, make_arrays
from tests.resuming import (
    FEW,
    TINY,
    Kill,
    KilledError,
    assert_equal,
    check,
    learn,
    offline_model,
    online_model,
    pendulum,
    pretrain,
    scramble,
    state_of,
)

# offline


@pytest.mark.parametrize("cls", [CPQL, ConsistencyBC])
def test_offline(cls, tmp_path):
    check(tmp_path, offline_model(cls, cosine_lr_decay=True), pretrain, [70, 140])


@pytest.mark.parametrize("cls", [ConsistencyAC, DiffusionQL])
def test_other_algorithms_offline(cls, tmp_path):
    check(tmp_path, offline_model(cls), pretrain, [135])


def test_a_teacher_is_resumed_with_its_actor(tmp_path):
    check(tmp_path, offline_model(CPQL, bc_loss="distill"), pretrain, [135])


def test_chunks_and_histories_offline(tmp_path):
    model = check(tmp_path, offline_model(CPQL, horizon=4, history=2), pretrain, [70])
    assert model.data.heldout_loss() == model.data.heldout_loss()


def test_offline_learn_with_weighted_datasets_and_a_schedule(tmp_path):
    def make(env):
        model = CPQL("MlpPolicy", VectorEnv(), learning_rate=lambda remaining: 1e-3 * remaining, **TINY)
        model.load_dataset([make_arrays(action_dim=2), make_arrays(action_dim=2, seed=1)], weights=[1, 3])
        return model

    check(tmp_path, make, pretrain, [135])


def test_the_second_call_is_continued_with_its_own_schedule(tmp_path):
    def run(model, callback):
        if model.n_updates == 0:
            model.pretrain(70)
        model.pretrain(140, callback=callback)

    model = check(tmp_path, offline_model(CPQL, cosine_lr_decay=True), run, [205])
    assert model.n_updates == 210


def test_every_stage_of_ractd(tmp_path, monkeypatch):
    make = offline_model(RACTD, horizon=4, teacher_steps=70, reward_steps=65, warmup_steps=10)

    def run(model, callback):
        model.learn(200, callback=callback)

    stages = []

    def noting(*args, **kwargs):
        model = load_checkpoint(*args, **kwargs)
        stages.append(model.stage)
        return model

    monkeypatch.setattr("sb3_consistency.resume.callback.load_checkpoint", noting)
    check(tmp_path, make, run, [69, 134, 199])
    assert stages == ["teacher", "reward", "student"]


# online


@pytest.mark.parametrize("n_envs", [1, 2])
def test_online(n_envs, tmp_path):
    check(tmp_path, online_model(), learn, [25, 61, 120], env=pendulum(n_envs))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_steps": 3},
        {"train_freq": 7, "gradient_steps": -1},
        {"train_freq": (2, "episode"), "gradient_steps": 5},
        {"buffer_size": 50},
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2))},
    ],
)
def test_ways_to_collect(kwargs, tmp_path):
    def make(env):
        return CPQL("MlpPolicy", env, **{**TINY, **FEW, "learning_starts": 30, "buffer_size": 1000, **kwargs})

    check(tmp_path, make, learn, [110], env=VectorEnv)


def test_inside_a_chunk(tmp_path):
    """Random steps end at 30, chunks begin at 30, 37, 44: no checkpoint is between two."""
    model = check(tmp_path, online_model(horizon=7, history=2), learn, [55, 70], env=pendulum())
    assert model.memory.age.tolist() == [(119 - 30) % 7]


def test_a_continued_learn_is_continued(tmp_path):
    def run(model, callback):
        if model.num_timesteps == 0:
            model.learn(50)
        model.learn(70, callback=callback, reset_num_timesteps=False)

    make = online_model(learning_rate=lambda remaining: 1e-3 * remaining)
    assert check(tmp_path, make, run, [100], env=VectorEnv).num_timesteps == 120


def test_images_and_layers_that_normalise_batches(tmp_path):
    class Extractor(NatureCNN):
        def __init__(self, space):
            super().__init__(space, features_dim=8)
            self.linear = th.nn.Sequential(self.linear, th.nn.BatchNorm1d(8), th.nn.Dropout(0.3))

    def make(env):
        kwargs = {**TINY, **FEW, "policy_kwargs": {"net_arch": [16], "features_extractor_class": Extractor}}
        return CPQL("CnnPolicy", env, learning_starts=30, buffer_size=100, **kwargs)

    def run(model, callback):
        model.learn(60, callback=callback)

    image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    check(tmp_path, make, run, [55], env=lambda: VecFrameStack(DummyVecEnv([lambda: VectorEnv(image)]), 2))


def test_vec_normalize_and_vectorized_noise(tmp_path):
    model = check(
        tmp_path,
        online_model(action_noise=NormalActionNoise(np.zeros(1), np.ones(1))),
        learn,
        [100],
        env=lambda: VecNormalize(pendulum(2)()),
    )
    assert model.get_vec_normalize_env().obs_rms.count > 120


class GoalEnv(VectorEnv):
    def __init__(self):
        box = spaces.Box(-1, 1, (2,), np.float32)
        names = ("observation", "achieved_goal", "desired_goal")
        super().__init__(observation_space=spaces.Dict(dict.fromkeys(names, box)))

    def compute_reward(self, achieved, desired, info):
        return -np.linalg.norm(achieved - desired, axis=-1)


def test_hindsight(tmp_path):
    def make(env):
        return CPQL(
            "MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **TINY, **FEW, learning_starts=30, buffer_size=500
        )

    check(tmp_path, make, learn, [105], env=GoalEnv)


def test_mujoco(tmp_path):
    pytest.importorskip("mujoco")

    # on end of its first short episodes Hopper falls; Ant's reward reads quantities derived in the last step
    for name in ("Hopper-v5", "Ant-v5"):
        check(tmp_path / name, online_model(), learn, [110], env=lambda name=name: gym.make(name))


@pytest.mark.parametrize("kwargs", [{}, {"offline_fraction": 0.5}, {"keep_offline": False}])
def test_both_phases(kwargs, tmp_path):
    def make(env):
        return CPQL("MlpPolicy", env, dataset=make_arrays(action_dim=2), pretrain_steps=100, **TINY, **FEW, **kwargs)

    model = check(tmp_path, make, learn, [(90, False), (21, True), (95, True)][bool(kwargs) :], env=VectorEnv)
    assert model.num_timesteps == 120 and model.n_updates == 220


def test_both_phases_with_vec_normalize(tmp_path):
    def make(env):
        return CPQL("MlpPolicy", env, dataset=make_arrays(action_dim=2), pretrain_steps=100, **TINY, **FEW)

    check(tmp_path, make, learn, [(90, False), (60, True)], env=lambda: VecNormalize(DummyVecEnv([VectorEnv])))


def test_a_run_killed_again_and_again(tmp_path):
    model = online_model()(pendulum()())
    learn(model, None)
    reference = state_of(model)
    model, kills = online_model()(pendulum()()), 0
    for at in (40, 47, 80, 81, 119):
        with pytest.raises(KilledError):
            callbacks = [ResumableCheckpointCallback(tmp_path, 5), Kill(at)]
            model.resume(callbacks) if kills else learn(model, callbacks)
        kills += 1
        scramble()
        model = CPQL.load_latest(tmp_path, env=pendulum()())
    assert_equal(state_of(model.resume()), reference)


# killed by SIGKILL


SCRIPT = """
import os, signal, sys
import numpy as np, torch as th
th.set_num_threads(1)
from sb3_consistency import CPQL, RACTD, ResumableCheckpointCallback, load_latest
from stable_baselines3.common.callbacks import BaseCallback
from tests.resuming import TINY, make_arrays, offline_model, online_model, pendulum

kind, folder, at_step, at_sync = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

class Kill(BaseCallback):
    def _on_step(self):
        if self.n_calls == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

count, fsync = 0, os.fsync
def counted(descriptor):
    global count
    count += 1
    if count == at_sync:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = counted

callbacks = [ResumableCheckpointCallback(folder, 20), Kill()]
if kind == "online":
    online_model()(pendulum()()).learn(120, callback=callbacks)
else:
    offline_model(RACTD, horizon=4, teacher_steps=100, reward_steps=70)(None).learn(300, callback=callbacks)
"""


@pytest.mark.parametrize(
    # a checkpoint takes 6 fsyncs, of files, manifest and two folders: the 9th falls into the second one's files
    ("kind", "step", "sync"),
    [("online", 77, 0), ("online", 0, 9), ("ractd", 201, 0)],
)
def test_killed_by_sigkill(kind, step, sync, tmp_path):
    arguments = [sys.executable, "-c", SCRIPT, kind, str(tmp_path), str(step), str(sync)]
    killed = subprocess.run(arguments, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert bool(leftovers) == (sync > 0)
    env = pendulum()() if kind == "online" else None
    model = load_latest(tmp_path, env=env).resume(ResumableCheckpointCallback(tmp_path, 20))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    if kind == "online":
        reference = online_model()(pendulum()())
        reference.learn(120)
    else:
        reference = offline_model(RACTD, horizon=4, teacher_steps=100, reward_steps=70)(None).learn(300)
    a, b = (leaves(m.get_parameters()) for m in (model, reference))
    assert all(th.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, th.Tensor))


# environments whose state can't be captured


class Opaque(gym.utils.EzPickle, VectorEnv):
    """Pickles without its state, as Box2D's environments do."""

    def __init__(self):
        gym.utils.EzPickle.__init__(self)
        VectorEnv.__init__(self)


@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 3}, {"buffer_size": 40}])
def test_new_episode_where_the_state_is_lost(kwargs, tmp_path):
    model = CPQL("MlpPolicy", Opaque(), **{**TINY, **FEW, "learning_starts": 30, "buffer_size": 500, **kwargs})
    with pytest.raises(KilledError):
        learn(model, [ResumableCheckpointCallback(tmp_path, 1), Kill(66)])
    with pytest.warns(UserWarning, match=r"EzPickle.*new episode.*truncated") as record:
        model = CPQL.load_latest(tmp_path, env=Opaque())
    assert len(record) == 1
    assert model.num_timesteps == 65
    buffer = model.replay_buffer
    row = (buffer.pos - 1) % buffer.buffer_size
    assert buffer.dones[row, 0] == 1 and buffer.timeouts[row, 0] == 1 and buffer.dones[row - 1, 0] == 0
    model.resume()
    assert model.num_timesteps == 120
    # the next episode is a whole one
    ends = buffer.dones[:, 0].nonzero()[0] if not buffer.full else None
    assert ends is None or ends.tolist() == [9, 19, 29, 39, 49, 59, 64, 74, 84, 94, 104, 114]


def test_hindsight_where_the_state_is_lost(tmp_path):
    class OpaqueGoalEnv(gym.utils.EzPickle, GoalEnv):
        def __init__(self):
            gym.utils.EzPickle.__init__(self)
            GoalEnv.__init__(self)

    kwargs = {**TINY, **FEW, "learning_starts": 30, "buffer_size": 500}
    model = CPQL("MultiInputPolicy", OpaqueGoalEnv(), replay_buffer_class=HerReplayBuffer, **kwargs)
    with pytest.raises(KilledError):
        learn(model, [ResumableCheckpointCallback(tmp_path, 1), Kill(66)])
    with pytest.warns(UserWarning, match="EzPickle") as record:
        model = CPQL.load_latest(tmp_path, env=OpaqueGoalEnv())
    assert len(record) == 1
    assert model.replay_buffer.ep_length[60:65, 0].tolist() == [5] * 5
    assert model.resume().num_timesteps == 120


def test_before_its_first_episode_no_state_is_lost(tmp_path):
    def make(env):
        return CPQL("MlpPolicy", env, dataset=make_arrays(action_dim=2), pretrain_steps=100, **TINY, **FEW)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(tmp_path, make, learn, [(90, False)], env=Opaque)


def test_unpicklable_attributes_are_named(tmp_path):
    class WithFile(VectorEnv):
        def reset(self, **kwargs):
            self.handle = open(os.devnull)
            return super().reset(**kwargs)

    model = CPQL("MlpPolicy", WithFile(), **TINY, **FEW)
    with pytest.raises(KilledError):
        learn(model, [ResumableCheckpointCallback(tmp_path, 10), Kill(66)])
    with pytest.warns(UserWarning, match=r"WithFile\.handle can't be pickled"):
        CPQL.load_latest(tmp_path, env=WithFile())


@pytest.mark.parametrize("wrapped", [True, False])
def test_environments_in_other_processes(wrapped, tmp_path, request):
    def env():
        kwargs = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}}
        made = make_vec_env("Pendulum-v1", 2, seed=3, wrapper_class=CapturableEnv if wrapped else None, **kwargs)
        request.addfinalizer(made.close)
        return made

    if wrapped:
        check(tmp_path, online_model(), learn, [100], env=env)
        return
    with pytest.raises(KilledError):
        learn(online_model()(env()), [ResumableCheckpointCallback(tmp_path, 10), Kill(66)])
    with pytest.warns(UserWarning, match=r"SubprocVecEnv.*CapturableEnv"):
        load_latest(tmp_path, env=env())


def test_an_environment_may_capture_itself(tmp_path):
    class Simulator(Opaque):
        def capture_state(self):
            return self.t, self.observation_space.np_random.bit_generator.state

        def restore_state(self, state):
            self.t, self.observation_space.np_random.bit_generator.state = state

    check(tmp_path, online_model(), learn, [66], env=Simulator)
