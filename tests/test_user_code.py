"""What users build around SB3's models: copies of them, callbacks, buffers, networks and subclasses of their own."""

import pickle
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_consistency import CPQL, ConsistencyAC, ConsistencyBC
from sb3_consistency.training import algorithm as training
from sb3_consistency.training.batches import bytes_per_transition
from tests.conftest import SMALL, VectorEnv, make_arrays
from tests.test_contract import actor_critics, assert_same, every, make
from tests.test_gradient_step import weights

ONLINE = {**SMALL, "learning_starts": 4, "buffer_size": 200}


# copies


@every
@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_on_and_leaves_its_original_alone(cls, copied):
    model = make(cls).pretrain(3)
    copy = copied(model)
    assert_same(model, copy)
    before = weights(model).clone()
    copy.pretrain(2)
    assert th.equal(before, weights(model)) and not th.equal(before, weights(copy))
    model.pretrain(2)
    assert not th.equal(before, weights(model))


# callbacks


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
    assert model._n_updates > 20 and model.num_timesteps == 20, "two episodes of ten steps, none of them offline"


# the constructor's pretraining


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
    assert loaded.num_timesteps == 6 and loaded._n_updates >= 10 + taken
    assert loaded._n_updates <= 10 + taken + 6 and loaded.is_pretrained


# buffers


class WithoutReplacement(ReplayBuffer):
    def sample(self, batch_size, env=None):
        sizes.append(batch_size)
        return self._get_samples(np.random.choice(self.size(), batch_size, replace=False), env=env)


sizes = []


def test_own_buffers_are_asked_for_one_batch_at_a_time():
    sizes.clear()
    options = {**ONLINE, "learning_starts": 8, "batch_size": 8, "gradient_steps": 4, "replay_buffer_class": WithoutReplacement}
    model = CPQL("MlpPolicy", VectorEnv(), **options).learn(12)
    assert model._n_updates == 4 * 4 and set(sizes) == {8}
    model.load_dataset(make_arrays(action_dim=2))
    model.pretrain(10)
    assert max(sizes) == 8, "both buffers share a batch"


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


# networks and rates


def test_a_function_may_make_the_extractor(tmp_path):
    kwargs = {"net_arch": [32], "features_extractor_class": partial(FlattenExtractor)}
    model = make(CPQL, policy_kwargs=kwargs).pretrain(2)
    model.save(tmp_path / "model")
    assert_same(model, CPQL.load(tmp_path / "model"))


@actor_critics
def test_a_schedule_set_on_the_model_holds_for_all_networks(cls):
    model = cls("MlpPolicy", VectorEnv(), **ONLINE).learn(6)
    model.lr_schedule = lambda _: 1e-6
    model.learn(6)
    rates = [getattr(model, name).optimizer.param_groups[0]["lr"] for name in model.policy.trained_networks()]
    assert rates == [1e-6] * len(rates)


def test_an_actor_asked_alone_goes_on_training(monkeypatch):
    model = make(ConsistencyAC, policy_kwargs={"network": "ln_resnet", "net_arch": [32]}).pretrain(1)
    modes = []
    loss = model.actor_loss
    monkeypatch.setattr(model, "actor_loss", lambda batch: modes.append(model.actor.training) or loss(batch))
    model.updater._gradients.clear()
    model.actor.predict(np.zeros(3, np.float32))
    assert not model.actor.training and model.policy.training
    model.pretrain(1)
    assert modes == [True]


def test_train_has_sb3s_default_batch_size():
    model = make(CPQL).pretrain(1)
    model.train(2)
    assert model._n_updates == 3


@actor_critics
def test_predictions_for_no_observation(cls):
    model = make(cls)
    for deterministic in (True, False):
        assert model.predict(np.zeros((0, 3), np.float32), deterministic=deterministic)[0].shape == (0, 1)


# subclasses


class Renamed(CPQL):
    pass


def test_files_of_subclasses_load_in_their_base(tmp_path):
    model = make(Renamed).pretrain(1)
    model.save(tmp_path / "model")
    assert_same(model, CPQL.load(tmp_path / "model"))
    with pytest.raises(ValueError, match="This is a CPQL"):
        ConsistencyAC.load(tmp_path / "model")
