"""Exact resume: a run that is killed and continued ends in the weights of the one that was not, bit for bit."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_consistency import (
    CPQL,
    RACTD,
    CapturableEnv,
    CheckpointError,
    ConsistencyAC,
    ConsistencyBC,
    DiffusionQL,
    ResumableCheckpointCallback,
    load_latest,
)
from sb3_consistency.resume.callback import load_checkpoint
from sb3_consistency.training.updater import DivergenceError
from tests.conftest import VectorEnv, make_arrays

# few candidates to act by, for speed
FEW = {"n_candidates": 4}
TINY = {"policy_kwargs": {"net_arch": [16]}, "batch_size": 16, "seed": 0, "device": "cpu"}


class KilledError(Exception):
    """The process is gone."""


class Kill(BaseCallback):
    def __init__(self, at, online=None):
        super().__init__()
        self.at, self.online = at, online

    def _on_step(self):
        if self.online in (None, not self.model.in_offline_phase) and self.model.num_timesteps >= self.at:
            raise KilledError
        return True


def state_of(model):
    """All that the future of a run depends on, as leaves; to be asked for as soon as the run is over."""
    buffers = [b for b in (model.replay_buffer, model.offline_buffer) if b is not None]
    arrays = [vars(b)[name] for b in buffers for name in ("observations", "actions", "rewards", "dones", "pos")]
    norm = model.get_vec_normalize_env()
    statistics = [] if norm is None else [norm.obs_rms.mean, norm.obs_rms.var, norm.ret_rms.var, norm.returns]
    counters = [model.num_timesteps, model._n_updates, model._episode_num, model._total_timesteps, model.run.curriculum_end]
    draws = [random.random(), np.random.rand(), th.rand(1), model.action_space.sample()]
    tree = [model.get_parameters(), arrays, statistics, model._last_obs, counters, draws]
    return [np.asarray(leaf) for leaf in th.utils._pytree.tree_leaves(tree)]


def assert_equal(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)


def scramble():
    """A new process has other random states."""
    random.seed(99)
    np.random.seed(99)
    th.manual_seed(99)


def check(folder, make, run, kills, env=lambda: None, save_freq=20):
    """
    Compare a run with ones that are killed and continued.

    ``make(env)`` builds the model, ``run(model, callback)`` trains it, ``env()`` makes the environment; ``kills`` are
    timesteps, or (timestep, whether it is the online phase's).
    """
    uninterrupted = make(env())
    run(uninterrupted, None)
    reference = state_of(uninterrupted)
    for kill in kills:
        place = folder / str(kill)
        with pytest.raises(KilledError):
            run(make(env()), [ResumableCheckpointCallback(place, save_freq), Kill(*np.atleast_1d(kill))])
        scramble()
        model = load_latest(place, env=env())
        scramble()
        assert model._n_updates < uninterrupted._n_updates
        model.resume(ResumableCheckpointCallback(place, save_freq))
        assert_equal(state_of(model), reference)
    return model


# offline


def offline_model(cls, **kwargs):
    def make(env):
        model = cls("MlpPolicy", env, dataset=make_arrays(), dataset_kwargs={"heldout_fraction": 0.2}, **{**TINY, **kwargs})
        model.data.load_of_constructor()
        return model

    return make


def pretrain(model, callback):
    model.pretrain(140, callback=callback, log_interval=50)


@pytest.mark.parametrize("cls", [CPQL, ConsistencyBC])
def test_offline(cls, tmp_path):
    check(tmp_path, offline_model(cls, cosine_lr_decay=True), pretrain, [70, 140])


@pytest.mark.parametrize("cls", [ConsistencyAC, DiffusionQL])
def test_other_algorithms_offline(cls, tmp_path):
    check(tmp_path, offline_model(cls), pretrain, [135])


def test_offline_learn_with_weighted_datasets_and_a_schedule(tmp_path):
    def make(env):
        model = CPQL("MlpPolicy", VectorEnv(), learning_rate=lambda remaining: 1e-3 * remaining, **TINY)
        model.load_dataset([make_arrays(action_dim=2), make_arrays(action_dim=2, seed=1)], weights=[1, 3])
        return model

    check(tmp_path, make, pretrain, [135])


def test_the_second_call_is_continued_with_its_own_schedule(tmp_path):
    def run(model, callback):
        if model._n_updates == 0:
            model.pretrain(70)
        model.pretrain(140, callback=callback)

    model = check(tmp_path, offline_model(CPQL, cosine_lr_decay=True), run, [205])
    assert model._n_updates == 210


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


def pendulum(n_envs=1):
    return lambda: make_vec_env("Pendulum-v1", n_envs=n_envs, seed=3)


def online_model(**kwargs):
    kwargs = {**TINY, **FEW, "learning_starts": 30, "buffer_size": 1000, "train_freq": 2, **kwargs}
    return lambda env: CPQL("MlpPolicy", env, **kwargs)


def learn(model, callback):
    model.learn(120, callback=callback)


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
    assert model.num_timesteps == 120 and model._n_updates == 220


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
from tests.test_resume import TINY, make_arrays, offline_model, online_model, pendulum

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
    a, b = (th.utils._pytree.tree_leaves(m.get_parameters()) for m in (model, reference))
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


# what is on the disk


def killed_run(folder, keep=2, at=119, env=VectorEnv):
    model = online_model()(env())
    with pytest.raises(KilledError):
        learn(model, [ResumableCheckpointCallback(folder, 20, keep=keep), Kill(at)])
    return model


def checkpoints(folder):
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_ones_are_kept(keep, tmp_path):
    killed_run(tmp_path, keep)
    assert checkpoints(tmp_path) == [f"checkpoint-{i:06d}" for i in range(6 - keep, 6)]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["model.zip", "state.pkl", "replay_buffer.pkl", "manifest.json"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(name, damage, tmp_path):
    killed_run(tmp_path)
    damage(tmp_path / "checkpoint-000005" / name)
    with pytest.warns(UserWarning, match=rf"000005.{name}.*Falling back to checkpoint-000004"):
        model = load_latest(tmp_path, env=VectorEnv())
    assert model.num_timesteps == 80
    damage(tmp_path / "checkpoint-000004" / name)
    with pytest.raises(CheckpointError, match=rf"(?s)no checkpoint.*intact.*000005.{name}.*000004.{name}"):
        load_latest(tmp_path, env=VectorEnv())


def test_folders_without_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load_latest(folder)
    with pytest.raises(ValueError, match="save_freq"):
        ResumableCheckpointCallback(tmp_path, 0)
    with pytest.raises(ValueError, match="keep"):
        ResumableCheckpointCallback(tmp_path, 1, keep=0)
    with pytest.raises((TypeError, ValueError), match="keep"):
        ResumableCheckpointCallback(tmp_path, 1, keep=2.5)


def test_data_is_written_once(tmp_path):
    def make(env):
        return CPQL("MlpPolicy", env, dataset=make_arrays(action_dim=2), pretrain_steps=100, **TINY, **FEW)

    writes = []
    os_replace = os.replace

    def replace(source, target):
        writes.append(str(target))
        os_replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        check(tmp_path, make, learn, [(95, True)], env=VectorEnv)
    tmp_path = tmp_path / "(95, True)"
    assert len([w for w in writes if "dataset-" in w]) == 1
    assert len([n for n in checkpoints(tmp_path) if n.startswith("dataset-")]) == 1
    # new data, new file; the old one goes with the last checkpoint that needs it
    model = make(VectorEnv())
    model.load_dataset(make_arrays(action_dim=2, seed=5))
    with pytest.warns(UserWarning, match="another run"):
        model.pretrain(130, callback=ResumableCheckpointCallback(tmp_path, 20))
    assert len([n for n in checkpoints(tmp_path) if n.startswith("dataset-")]) == 1
    flip(next(tmp_path.glob("dataset-*")))
    with pytest.raises(CheckpointError, match=r"dataset-.*checksum"):
        load_latest(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_and_training_goes_on(tmp_path):
    model = online_model()(VectorEnv())
    learn(model, None)
    reference = state_of(model)

    class FullDisk(BaseCallback):
        def _on_step(self):
            limit = 2000 if 45 <= self.num_timesteps < 110 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return True

    model = online_model()(VectorEnv())
    try:
        with pytest.warns(UserWarning, match=r"step \d+ could not be written.*000002, is intact.*Training goes on") as record:
            learn(model, [FullDisk(), ResumableCheckpointCallback(tmp_path, 20, keep=9)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [str(w.message).split("step ")[1].split()[0] for w in record] == ["60", "80", "100"]
    assert checkpoints(tmp_path) == [f"checkpoint-00000{i}" for i in (1, 2, 3)]
    assert_equal(state_of(model), reference)
    flip(tmp_path / "checkpoint-000003" / "state.pkl")
    with pytest.warns(UserWarning, match="Falling back"):
        continued = load_latest(tmp_path, env=VectorEnv())
    assert continued.num_timesteps == 40
    assert_equal(state_of(continued.resume()), reference)


def test_leftovers_are_ignored_and_removed(tmp_path):
    killed_run(tmp_path)
    (tmp_path / ".unfinished-checkpoint-000006").mkdir()
    (tmp_path / ".unfinished-checkpoint-000006" / "model.zip").write_bytes(b"half")
    (tmp_path / ".unfinished-dataset").write_bytes(b"half")
    model = load_latest(tmp_path, env=VectorEnv())
    assert model.num_timesteps == 100
    model.resume(ResumableCheckpointCallback(tmp_path, 20))
    assert checkpoints(tmp_path) == ["checkpoint-000005", "checkpoint-000006"]


def test_other_versions_are_said(tmp_path):
    from sb3_consistency.resume.folder import _manifest_hash

    killed_run(tmp_path)
    path = tmp_path / "checkpoint-000005" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["environment"]["torch"] = "1.0"
    manifest["sha256"] = _manifest_hash(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"torch 1.0 -> .*not bit for bit"):
        load_latest(tmp_path, env=VectorEnv())


# what is asked for


def test_wrong_classes_and_environments(tmp_path):
    killed_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint of .*CPQL, not of .*ConsistencyAC"):
        ConsistencyAC.load_latest(tmp_path, env=VectorEnv())
    with pytest.raises(CheckpointError, match=r"written with DummyVecEnv, got VecNormalize of DummyVecEnv"):
        load_latest(tmp_path, env=VecNormalize(DummyVecEnv([VectorEnv])))
    with pytest.raises(CheckpointError, match="1 environments, got 2"):
        load_latest(tmp_path, env=DummyVecEnv([VectorEnv, VectorEnv]))
    with pytest.raises(CheckpointError, match=r"Monitor of VectorEnv.*TimeLimit"):
        load_latest(tmp_path, env=gym.wrappers.TimeLimit(VectorEnv(), 5))
    with pytest.raises(ValueError, match="env: the interrupted run had an environment"):
        load_latest(tmp_path).resume()
    with pytest.raises(ValueError, match="no interrupted run"):
        online_model()(VectorEnv()).resume()
    model = load_latest(tmp_path, env=VectorEnv()).resume()
    with pytest.raises(ValueError, match="no interrupted run"):
        model.resume()
    with pytest.raises(ValueError, match="no interrupted run"):
        load_latest(tmp_path, env=VectorEnv()).learn(5).resume()
    with pytest.raises(TypeError, match="SAC can't resume"):
        SAC("MlpPolicy", VectorEnv()).learn(1, callback=ResumableCheckpointCallback(tmp_path / "sac", 1))


def test_it_must_see_the_rollouts(tmp_path):
    with pytest.raises(ValueError, match=r"not to EveryNTimesteps"):
        learn(online_model()(VectorEnv()), EveryNTimesteps(10, ResumableCheckpointCallback(tmp_path, 1)))


def test_a_finished_run_has_nothing_left(tmp_path):
    model = online_model()(VectorEnv())
    learn(model, ResumableCheckpointCallback(tmp_path, 1000))
    assert checkpoints(tmp_path) == ["checkpoint-000001"]
    reference = state_of(model)
    scramble()
    loaded = load_latest(tmp_path, env=VectorEnv()).resume(ResumableCheckpointCallback(tmp_path, 1000))
    assert_equal(state_of(loaded), reference)
    assert checkpoints(tmp_path) == ["checkpoint-000001"]
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps == 130


def test_a_stopped_run_is_not_saved_in_the_middle_of_a_rollout(tmp_path):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 64

    model = online_model(train_freq=7)(VectorEnv())
    learn(model, None)
    reference = state_of(model)
    learn(online_model(train_freq=7)(VectorEnv()), [ResumableCheckpointCallback(tmp_path, 20), Stop()])
    scramble()
    assert_equal(state_of(load_latest(tmp_path, env=VectorEnv()).resume()), reference)


def test_divergence_names_the_checkpoint(tmp_path):
    class Infinite(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 70:
                self.model.replay_buffer.rewards.fill(np.inf)
            return True

    model = offline_model(CPQL)(None)
    with pytest.raises(DivergenceError, match=r"The last checkpoint is .*checkpoint-000002"):
        model.pretrain(300, callback=[ResumableCheckpointCallback(tmp_path, 20), Infinite()])
    assert np.isfinite(load_latest(tmp_path).replay_buffer.rewards).all()


def test_callbacks_count_on(tmp_path):
    def run(folder, kill):
        evaluation = EvalCallback(
            make_vec_env(VectorEnv, seed=0), eval_freq=7, n_eval_episodes=1, log_path=str(folder), verbose=0
        )
        callbacks = [ResumableCheckpointCallback(folder, 20), evaluation, *kill]
        return callbacks, evaluation

    callbacks, evaluation = run(tmp_path, [Kill(70)])
    with pytest.raises(KilledError):
        learn(online_model()(VectorEnv()), callbacks)
    callbacks, evaluation = run(tmp_path, [])
    load_latest(tmp_path, env=VectorEnv()).resume(callbacks)
    assert evaluation.evaluations_timesteps == list(range(7, 120, 7)) and evaluation.n_calls == 120


@pytest.mark.parametrize("kept", [True, False])
def test_the_best_model_goes_with_its_score(kept, tmp_path):
    def run(name, kill):
        folder = str(tmp_path / name)
        evaluation = EvalCallback(
            make_vec_env(VectorEnv, seed=0), eval_freq=50, n_eval_episodes=1, best_model_save_path=folder, verbose=0
        )
        return [ResumableCheckpointCallback(tmp_path / "checkpoints", 20), evaluation, *kill], evaluation

    callbacks, evaluation = run("old", [Kill(75)])
    with pytest.raises(KilledError):
        learn(online_model()(VectorEnv()), callbacks)
    evaluation.best_mean_reward = 1e9
    if not kept:
        (tmp_path / "old" / "best_model.zip").unlink()
    callbacks, evaluation = run("new", [])
    load_latest(tmp_path / "checkpoints", env=VectorEnv()).resume(callbacks)
    assert (tmp_path / "new" / "best_model.zip").exists() and np.isfinite(evaluation.best_mean_reward)


def test_tensorboard_and_log_interval_continue(tmp_path):
    pytest.importorskip("tensorboard")

    def make(env):
        return online_model(tensorboard_log=str(tmp_path / "tb"))(env)

    model = make(VectorEnv())
    with pytest.raises(KilledError):
        model.learn(
            120, callback=[ResumableCheckpointCallback(tmp_path / "c", 20), Kill(70)], tb_log_name="mine", log_interval=1
        )
    load_latest(tmp_path / "c", env=VectorEnv()).resume()
    assert [p.name for p in (tmp_path / "tb").iterdir()] == ["mine_1"]
    assert len(list((tmp_path / "tb" / "mine_1").iterdir())) == 2


def test_ways_to_import():
    code = "import sys, sb3_consistency; sb3_consistency.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 0
