"""Callbacks see every step of both phases; logs and scores go where SB3's do."""

import gc
import sys

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, configure
from stable_baselines3.common.vec_env import VecNormalize

from sb3_consistency import CPQL, ConsistencyBC
from sb3_consistency.training.algorithm import COMPILING_PAYS
from sb3_consistency.training.updater import RunningMeans
from tests.conftest import (
    ONLINE,
    SMALL,
    Counter,
    VectorEnv,
    actor_critics,
    assert_same,
    box_env,
    every,
    loaded,
    make,
    make_arrays,
    online,
)


@every
def test_callbacks_in_pretraining(cls, tmp_path):
    model = make(cls)
    counter = Counter()
    checkpoints = CheckpointCallback(5, str(tmp_path))
    evaluation = EvalCallback(make_vec_env(box_env), n_eval_episodes=1, eval_freq=5, verbose=0)
    model.pretrain(10, callback=[counter, checkpoints, evaluation])
    assert counter.steps == list(range(1, 11)) and (counter.started, counter.ended) == (1, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rl_model_10_steps.zip", "rl_model_5_steps.zip"]
    assert evaluation.n_calls == 10 and np.isfinite(evaluation.last_mean_reward)
    assert model.num_timesteps == 0 and model.n_updates == 10
    stopper = Counter(stop_at=3)
    model.pretrain(10, callback=stopper)
    assert len(stopper.steps) == 3 and stopper.steps[0] == 11 and model.n_updates == 13


@every
def test_callbacks_of_sb3(cls, tmp_path):
    model, env = make(cls), make_vec_env(box_env)
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1e9, verbose=0)
    patience = StopTrainingOnNoModelImprovement(max_no_improvement_evals=100)
    events = []
    every_n = EveryNTimesteps(4, CheckpointCallback(1, str(tmp_path / "every")))
    evaluation = EvalCallback(
        env,
        callback_on_new_best=stop,
        callback_after_eval=patience,
        eval_freq=10,
        n_eval_episodes=1,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "log"),
        verbose=0,
    )

    def note(local_variables, global_variables):
        events.append(local_variables["self"])
        return True

    model.curriculum_steps = 8  # a planner can act at the first evaluation
    callbacks = CallbackList([every_n, evaluation])
    model.pretrain(30, callback=callbacks)
    assert model.n_updates == 10  # the evaluation stopped it
    assert (tmp_path / "best" / "best_model.zip").exists() and (tmp_path / "log" / "evaluations.npz").exists()
    assert len(list((tmp_path / "every").iterdir())) == 2
    assert_same(model, cls.load(tmp_path / "best" / "best_model"))
    model.pretrain(2, callback=note)  # a function
    assert events == [model, model]


@actor_critics
def test_checkpoints_with_buffer_and_statistics(cls, tmp_path):
    env = VecNormalize(make_vec_env(lambda: box_env(length=5)))
    model = online(cls, env)
    checkpoint = CheckpointCallback(10, str(tmp_path), "m", save_replay_buffer=True, save_vecnormalize=True)
    model.learn(40, callback=[checkpoint, StopTrainingOnMaxEpisodes(max_episodes=4)])
    assert model.num_timesteps == 20
    names = {path.name for path in tmp_path.iterdir()}
    assert {"m_20_steps.zip", "m_replay_buffer_20_steps.pkl", "m_vecnormalize_20_steps.pkl"} <= names
    resumed = cls.load(tmp_path / "m_20_steps", env=env)
    resumed.load_replay_buffer(tmp_path / "m_replay_buffer_20_steps")
    resumed.learn(10, reset_num_timesteps=False)
    assert resumed.num_timesteps == 30 and resumed.replay_buffer.size() == 29  # SB3 saves before it stores the step


class Calls(BaseCallback):
    def __init__(self):
        super().__init__()
        self.at = []

    def _on_step(self):
        self.at.append((self.model.in_offline_phase, self.model.num_timesteps))
        return True


def test_callbacks_that_count_timesteps_count_anew_online():
    calls = Calls()
    model = CPQL("MlpPolicy", VectorEnv(), dataset=make_arrays(action_dim=2), pretrain_steps=40, **ONLINE)
    model.learn(30, callback=EveryNTimesteps(10, calls))
    assert calls.at == [*((True, n) for n in (10, 20, 30, 40)), *((False, n) for n in (10, 20, 30))]


class Watcher(BaseCallback):
    def _on_step(self):
        n = self.training_env.num_envs
        assert len(self.locals["infos"]) == len(self.locals["dones"]) == len(self.locals["rewards"]) == n
        return True


def test_callbacks_that_watch_environments_see_nothing_happen_offline():
    model = CPQL("MlpPolicy", VectorEnv(), dataset=make_arrays(action_dim=2), pretrain_steps=20, **ONLINE)
    model.learn(50, callback=[StopTrainingOnMaxEpisodes(2), LogEveryNTimesteps(5), Watcher()])
    assert model.n_updates > 20 and model.num_timesteps == 20, "two episodes of ten steps, none of them offline"


def test_evaluation_of_a_model_without_environment():
    callback = EvalCallback(make_vec_env(box_env), n_eval_episodes=1, eval_freq=5, verbose=0)
    data = {**make_arrays(), "observation_space": box_env().observation_space}
    model = ConsistencyBC("MlpPolicy", dataset=data, **SMALL).learn(10, callback=callback)
    assert np.isfinite(callback.last_mean_reward) and model.get_env() is None


# logs


class Recorder(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append((step, dict(key_values)))

    def close(self):
        pass


def test_logs_of_both_phases_and_normalized_score():
    model = make(CPQL)
    model.reference_returns = (-10.0, 0.0)
    recorder = Recorder()
    model.set_logger(Logger(None, [recorder]))
    model.pretrain(20, EvalCallback(make_vec_env(box_env), n_eval_episodes=2, eval_freq=10, verbose=0), log_interval=10)
    losses = [row for _, row in recorder.rows if "train/actor_loss" in row]
    assert [row["train/n_updates"] for row in losses] == [10, 20]
    assert {"train/critic_loss", "train/bc_loss", "train/q_loss", "train/learning_rate"} <= losses[0].keys()
    scores = [row for _, row in recorder.rows if "eval/mean_reward" in row]
    assert len(scores) == 2
    for row in scores:
        assert row["eval/normalized_score"] == pytest.approx(100 * (row["eval/mean_reward"] + 10) / 10)


def test_normalized_scores_are_each_models_own_and_those_of_its_latest_data():
    logger = Logger(None, [])
    models = [make(CPQL), make(CPQL)]
    for model, expert_return in zip(models, (100.0, 200.0), strict=True):
        model.reference_returns = (0.0, expert_return)
        model.set_logger(logger)
        model.pretrain(1)
    for model, score in zip(models, (50.0, 25.0), strict=True):
        model.logger.record("eval/mean_reward", 50.0)
        assert logger.name_to_value["eval/normalized_score"] == score
    logger.name_to_value.clear()
    models[0].load_dataset(make_arrays())  # which names no references
    models[0].pretrain(1).logger.record("eval/mean_reward", 50.0)
    assert models[0].logger is logger and "eval/normalized_score" not in logger.name_to_value


@every
def test_tensorboard(cls, tmp_path):
    model = make(cls, tensorboard_log=str(tmp_path))
    model.pretrain(3, log_interval=1)
    if not cls.offline_only:
        model.learn(30)
    names = {p.name for p in tmp_path.iterdir()}
    assert f"{cls.__name__}_pretrain_1" in names and len(names) == (1 if cls.offline_only else 2)


@pytest.mark.parametrize("cpus_compiler", [True, False])
def test_long_runs_are_told_that_compiling_pays(monkeypatch, tmp_path, cpus_compiler):
    monkeypatch.setattr("sb3_consistency.compiled.shutil.which", lambda name: "/usr/bin/g++" if cpus_compiler else None)

    def told(n_steps: int, **kwargs) -> bool:
        model = CPQL("MlpPolicy", "Pendulum-v1", **kwargs)
        model.set_logger(configure(str(tmp_path), ["log"]))
        model.learn(n_steps, callback=lambda *_: False)
        return "compile=True" in (tmp_path / "log.txt").read_text()

    assert told(COMPILING_PAYS) == cpus_compiler
    assert not told(COMPILING_PAYS, compile=True)
    assert not told(COMPILING_PAYS - 1) and not told(COMPILING_PAYS, train_freq=4)
    assert told(COMPILING_PAYS, train_freq=4, gradient_steps=-1) == cpus_compiler


def test_user_logger_is_kept(tmp_path):
    model = make(CPQL)
    logger = configure(str(tmp_path), ["csv", "json", "log"])
    model.set_logger(logger)
    model.pretrain(2, log_interval=1)
    assert model.logger is logger and (tmp_path / "progress.csv").read_text().count("\n") == 3
    assert not any(isinstance(f, HumanOutputFormat) and f.file is sys.stdout for f in logger.output_formats)


@every
def test_loggers(cls, tmp_path, capsys):
    model = make(cls, verbose=1)
    logger = configure(str(tmp_path), ["stdout", "csv", "json", "log", "tensorboard"])
    model.set_logger(logger)
    model.pretrain(4, log_interval=2)
    assert "train/n_updates" in (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert len((tmp_path / "progress.json").read_text().splitlines()) == 2
    assert "learning_rate" in capsys.readouterr().out and "learning_rate" in (tmp_path / "log.txt").read_text()
    assert any("tfevents" in path.name for path in tmp_path.iterdir())
    assert model.logger is logger


@every
def test_without_a_log_interval_nothing_is_written_but_by_callbacks(cls, tmp_path):
    class Dump(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.logger.dump(self.num_timesteps)

    for name, callback in {"silent": None, "dumped": Dump()}.items():
        model = make(cls)
        model.set_logger(configure(str(tmp_path / name), ["csv"]))
        model.pretrain(70, callback, log_interval=None)
        if not cls.offline_only:
            model.learn(70, log_interval=None)
        lines = (tmp_path / name / "progress.csv").read_text().splitlines()
        assert "train/actor_loss" in lines[0] or "_loss" in lines[0] if callback else not lines


@actor_critics
def test_online_logs_have_sb3s_names(cls, tmp_path):
    model = online(cls, box_env(length=5))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(25, log_interval=1)
    columns = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    names = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/episodes", "time/fps", "time/total_timesteps"}
    assert names | {"train/actor_loss", "train/critic_loss", "train/learning_rate", "train/n_updates"} <= set(columns)


def test_means_are_of_the_steps_that_have_the_metric():
    means = RunningMeans()
    kept = th.tensor(1.0)
    means.add({"a": kept})
    means.add({"a": th.tensor(4.0), "b": th.tensor(-2.0)})
    assert means.read() == {"a": 2.5, "b": -2.0}
    assert kept == 1.0
    assert RunningMeans().read() == {}


@every
def test_metrics_are_not_kept_for_every_step_until_the_next_log_line(cls):
    model, counts = loaded(cls), {}

    def count(scope, _):
        step = scope["self"].num_timesteps
        if step in (40, 55):
            counts[step] = sum(type(x) is th.Tensor for x in gc.get_objects())
        return True

    model.pretrain(60, callback=count)
    # the divergence guard keeps a flag per network
    assert counts[55] - counts[40] <= 15 * len(model.policy.trained_networks()), counts
