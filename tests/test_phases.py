"""Phases: what is trained when, from pretraining to experience, and what continues."""

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

from sb3_consistency import CPQL, ConsistencyAC, ConsistencyBC
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.training import progress
from tests.conftest import ACTOR_CRITICS, ONLINE, SMALL, Counter, VectorEnv, actor_critics, box_env, make, make_arrays, online


@actor_critics
def test_learn_pretrains_once_then_goes_online(cls, tmp_path):
    counter = Counter()
    model = cls("MlpPolicy", box_env(), dataset=make_arrays(), pretrain_steps=7, learning_starts=1000, **SMALL)
    model.learn(12, callback=counter)
    assert counter.steps == [*range(1, 8), *range(1, 13)]
    assert model.offline_buffer.size() == 120 and model.replay_buffer.size() == 12
    assert model.n_updates == 7 + 12  # no random warm-up after an offline phase
    model.learn(5)
    assert model.n_updates == 7 + 12 + 5
    model.save(tmp_path / "model")
    # the arrays are not saved with the model: experience gathers first, by the policy
    loaded = cls.load(tmp_path / "model", env=box_env(), learning_starts=3)
    loaded.learn(5)
    assert loaded.n_updates == 24 + 3 and loaded.learning_starts == 0


def test_stopping_the_pretraining_stops_learn():
    model = CPQL("MlpPolicy", box_env(), dataset=make_arrays(), pretrain_steps=7, **SMALL)
    model.learn(12, callback=Counter(stop_at=3))
    assert model.n_updates == 3 and model.num_timesteps == 0


def test_bc_needs_data_and_no_environment():
    model = ConsistencyBC("MlpPolicy", box_env(), **SMALL)
    with pytest.raises(DatasetError, match="load_dataset"):
        model.learn(5)
    with pytest.raises(ValueError, match="dataset"):
        ConsistencyBC("MlpPolicy")
    model = ConsistencyBC("MlpPolicy", dataset=make_arrays(), **SMALL).learn(6)
    assert model.num_timesteps == 6 and model.env is None
    model.learn(4, reset_num_timesteps=False)
    assert model.num_timesteps == 10


def test_actor_critics_pretrain_without_environment_but_do_not_collect():
    data = {**make_arrays(), "observation_space": box_env().observation_space}
    model = CPQL("MlpPolicy", dataset=data, pretrain_steps=3, **SMALL)
    with pytest.raises(ValueError, match="set_env"):
        model.learn(10)
    assert model.n_updates == 0
    model.learn(0)
    assert model.n_updates == 3
    model.set_env(box_env())
    model.learn(10)
    assert model.num_timesteps == 10 and model.n_updates == 13


def test_data_that_could_not_be_loaded_is_missed_again():
    model = CPQL("MlpPolicy", box_env(), dataset="no_such_file.npz", **SMALL)
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"no_such_file\.npz"):
            model.learn(2)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("several", [list, tuple])
def test_data_named_by_text_is_loaded_again(several, tmp_path):
    np.savez(tmp_path / "data.npz", **make_arrays())
    model = CPQL("MlpPolicy", box_env(), dataset=several([str(tmp_path / "data.npz")]), pretrain_steps=2, **SMALL)
    model.save(tmp_path / "model")
    assert CPQL.load(tmp_path / "model", env=box_env()).learn(3).offline_buffer.size() == 120


@actor_critics
def test_a_checkpoint_of_the_pretraining_takes_the_steps_that_are_left(cls, tmp_path):
    np.savez(tmp_path / "data.npz", **make_arrays())
    model = cls("MlpPolicy", box_env(), dataset=str(tmp_path / "data.npz"), pretrain_steps=20, **SMALL)
    model.learn(4, callback=CheckpointCallback(10, str(tmp_path)))
    resumed = cls.load(tmp_path / "rl_model_10_steps.zip", env=box_env())
    assert resumed.learning_starts == 0 and resumed.alpha_now() == 1.0
    resumed.learn(3, reset_num_timesteps=False)
    assert resumed.n_updates == 20 + 3 and resumed.num_timesteps == 3


@pytest.mark.parametrize(("asked", "taken"), [(None, 10), (0, 0), (14, 4)])
def test_what_is_left_of_a_pretraining_can_be_changed(asked, taken, tmp_path):
    data = make_arrays(action_dim=2)
    model = CPQL("MlpPolicy", VectorEnv(), dataset=data, pretrain_steps=20, **ONLINE)
    model.learn(0, callback=CheckpointCallback(10, str(tmp_path)))
    changed = {} if asked is None else {"pretrain_steps": asked}
    loaded = CPQL.load(tmp_path / "rl_model_10_steps.zip", env=VectorEnv(), **changed)
    if taken:
        loaded.load_dataset(data)
    else:
        loaded.learning_starts = 0
    assert loaded.is_pretrained == (taken == 0)
    loaded.learn(6)
    assert loaded.num_timesteps == 6 and loaded.n_updates >= 10 + taken
    assert loaded.n_updates <= 10 + taken + 6 and loaded.is_pretrained


def test_train_has_sb3s_default_batch_size():
    model = make(CPQL).pretrain(1)
    model.train(2)
    assert model.n_updates == 3


def test_progress_is_a_line_every_few_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    model = CPQL("MlpPolicy", VectorEnv(), dataset=make_arrays(action_dim=2), learning_starts=5, **SMALL)
    model.pretrain(3, progress_bar=True)
    model.learn(4, progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(",")[0] for line in lines]
    assert told == [
        *(f"Pretraining: {n} of 3 steps ({100 * n // 3} %)" for n in (1, 2, 3, 3)),
        *(f"Training: {n} of 4 steps ({25 * n} %)" for n in (1, 2, 3, 4, 4)),
    ]
    monkeypatch.setattr(progress, "SECONDS", 60.0)
    model.learn(4, progress_bar=True)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_progress_bar_and_continuing():
    model = online(ConsistencyAC).learn(20, progress_bar=True)
    model.learn(10, reset_num_timesteps=False, progress_bar=True)
    assert model.num_timesteps == 30
    model.load_dataset(make_arrays())
    model.pretrain(2, progress_bar=True)


# what changes from phase to phase


@pytest.mark.parametrize("decay", [None, True, False])
@pytest.mark.parametrize("actor_rate", [None, 2e-3])
@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_learning_rates_fall_offline_and_stay_online(cls, actor_rate, decay, monkeypatch):
    monkeypatch.setattr("sb3_consistency.training.pretraining.CHUNK", 1)  # else one rate serves 64 gradient steps

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            networks = self.model.policy.actor, self.model.policy.critic
            rates.append([network.optimizer.param_groups[0]["lr"] for network in networks])
            logged.append([self.logger.name_to_value[f"train/{name}"] for name in ("actor_learning_rate", "learning_rate")])
            return True

    options = {"cosine_lr_decay": decay, "actor_learning_rate": actor_rate, "learning_starts": 0, "learning_rate": 3e-4}
    model = cls("MlpPolicy", VectorEnv(), **options, **SMALL)
    model.load_dataset(make_arrays(action_dim=2))
    for run, phase_rate, falls in [(model.pretrain, 3e-3, decay is not False), (model.learn, 3e-4, decay is True)]:
        rates, logged = [], []
        run(20, callback=Watch())
        highest = [actor_rate or phase_rate, 3e-4]
        assert rates[1] == pytest.approx(highest, rel=0.05)
        assert rates[-1] == pytest.approx([(0.01 if falls else 1) * rate for rate in highest], rel=0.5)
        assert logged[2:18] == rates[2:18]


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_the_policy_clones_data_but_not_its_own_past(cls):
    model = cls("MlpPolicy", VectorEnv(), learning_starts=0, **SMALL).learn(4)
    assert model.alpha_now() == 0 and model.step_alpha is None
    model.load_dataset(make_arrays(action_dim=2))
    model.learn(4)
    assert model.alpha_now() == model.step_alpha == 1


def test_continued_offline_learning_continues_the_decay():
    model = ConsistencyBC("MlpPolicy", dataset=make_arrays(), **SMALL).learn(64)
    model.learn(64, reset_num_timesteps=False)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 3e-3)


def test_curriculum_steps_count_online_too():
    model = ConsistencyAC("MlpPolicy", box_env(), curriculum_steps=40, learning_starts=10, **SMALL).learn(30)
    assert model.progress.item() == pytest.approx(19 / 40)


@actor_critics
def test_a_schedule_set_on_the_model_holds_for_all_networks(cls):
    model = cls("MlpPolicy", VectorEnv(), **ONLINE).learn(6)
    model.lr_schedule = lambda _: 1e-6
    model.learn(6)
    rates = [getattr(model, name).optimizer.param_groups[0]["lr"] for name in model.policy.trained_networks()]
    assert rates == [1e-6] * len(rates)
