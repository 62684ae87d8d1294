"""Checkpoints on the disk: whole or named as broken, and what is asked of who resumes."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_consistency import (
    CPQL,
    CheckpointError,
    ConsistencyAC,
    ResumableCheckpointCallback,
    load_latest,
)
from sb3_consistency.envs.state import capture_env, restore_env
from sb3_consistency.training.updater import DivergenceError
from tests.conftest import VectorEnv, make_arrays
from tests.resuming import (
    FEW,
    TINY,
    Kill,
    KilledError,
    assert_equal,
    check,
    checkpoints,
    killed_run,
    learn,
    offline_model,
    online_model,
    scramble,
    state_of,
)

# what is on the disk


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
    with pytest.raises(ValueError, match="buffer_size: a run goes on with the buffer that it has"):
        load_latest(tmp_path, env=VectorEnv(), buffer_size=10)
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


def test_rl_zoo3s_time_limit_is_gymnasiums():
    """Importing rl-zoo3 puts its own class in the place of ``TimeLimit``: checkpoints go from its commands to a script."""

    class PatchedTimeLimit(gym.wrappers.TimeLimit):
        pass

    plain, patched = gym.wrappers.TimeLimit(VectorEnv(), 9), PatchedTimeLimit(VectorEnv(), 9)
    for source, target in ((plain, patched), (patched, plain)):
        source.reset(seed=0)
        for _ in range(3):
            source.step(source.action_space.sample())
        target.reset()
        restore_env(target, capture_env(source))
        assert target._elapsed_steps == source._elapsed_steps == 3


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
