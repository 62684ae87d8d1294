"""What a policy is worth, told from held-out episodes."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_consistency import (
    CPQL,
    RACTD,
    ConsistencyBC,
    DatasetError,
    FittedQEvaluationCallback,
    fitted_q_evaluation,
)
from tests.conftest import SMALL, every, make_arrays, weights

GAMMA, ACTION = 0.8, 0.5


def two_steps(n=600):
    """Two states, one after the other; rewards a, then 1 + a; the second step terminates."""
    rng = np.random.default_rng(0)
    second = np.arange(n) % 2
    actions = rng.uniform(-1, 1, (n, 1)).astype(np.float32)
    return {
        "observations": second[:, None].astype(np.float32),
        "next_observations": np.ones((n, 1), np.float32),
        "actions": actions,
        "rewards": second + actions[:, 0],
        "terminations": second == 1,
        "truncations": np.zeros(n, bool),
    }


def one_state(n=600):
    """One state for ever; rewards a; a time limit cuts every 20 steps."""
    data = two_steps(n)
    zeros = np.zeros((n, 1), np.float32)
    ends = {"terminations": np.zeros(n, bool), "truncations": np.arange(n) % 20 == 19}
    return {**data, **ends, "observations": zeros, "next_observations": zeros, "rewards": data["actions"][:, 0]}


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("data", "value"), [(two_steps, ACTION + GAMMA * (1 + ACTION)), (one_state, ACTION / (1 - GAMMA))], ids=["two", "one"]
)
def test_the_value_of_a_policy_that_did_not_make_the_data(data, value, deterministic, monkeypatch):
    model = CPQL("MlpPolicy", dataset=data(), gamma=GAMMA, **SMALL)
    model.load_dataset(model.dataset, heldout_fraction=0.5, reward_transform=lambda rewards: 10 * rewards)
    monkeypatch.setattr(model.policy, "_predict", lambda obs, deterministic: th.full((len(obs), 1), ACTION))
    found = fitted_q_evaluation(model, gradient_steps=600, target_share=0.05, deterministic=deterministic)
    assert found == pytest.approx(10 * value, rel=0.05)


class Blank(BaseFeaturesExtractor):
    """Tells nothing until it is trained."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 1)
        self.scale = th.nn.Parameter(th.zeros(1))

    def forward(self, observations):
        return self.scale * observations


def test_its_critic_trains_an_extractor_of_its_own(monkeypatch):
    kwargs = {**SMALL["policy_kwargs"], "features_extractor_class": Blank, "share_features_extractor": True}
    data = two_steps()
    data["rewards"] = data["rewards"] + 4 * data["observations"][:, 0]
    model = CPQL("MlpPolicy", dataset=data, gamma=0.5, **{**SMALL, "policy_kwargs": kwargs})
    model.load_dataset(model.dataset, heldout_fraction=0.5)
    monkeypatch.setattr(model.policy, "_predict", lambda obs, deterministic: th.full((len(obs), 1), ACTION))
    before = weights(model)
    found = fitted_q_evaluation(model, gradient_steps=1000, target_share=0.05)
    assert found == pytest.approx(ACTION + 0.5 * (5 + ACTION), rel=0.1)
    assert th.equal(weights(model), before)


def test_a_long_horizon_is_reached(monkeypatch):
    gamma = 0.97
    model = CPQL("MlpPolicy", dataset=one_state(), gamma=gamma, **SMALL)
    model.load_dataset(model.dataset, heldout_fraction=0.5)
    monkeypatch.setattr(model.policy, "_predict", lambda obs, deterministic: th.full((len(obs), 1), ACTION))
    assert fitted_q_evaluation(model, gradient_steps=3000) == pytest.approx(ACTION / (1 - gamma), rel=0.1)


@every
def test_it_leaves_a_run_as_it_was(cls):
    def train(callback):
        model = cls("MlpPolicy", dataset=make_arrays(), **SMALL)
        model.load_dataset(model.dataset, heldout_fraction=0.3)
        return model.pretrain(70, callback=callback)

    if cls is RACTD:
        with pytest.raises(ValueError, match="not of chunks or histories"):
            train(FittedQEvaluationCallback())
        return
    callback = FittedQEvaluationCallback(eval_freq=30, gradient_steps=2)
    assert th.equal(weights(train(callback)), weights(train(None)))
    assert callback.evaluations_timesteps == [30, 60, 70] and np.isfinite(callback.evaluations_results).all()


def test_it_is_logged(monkeypatch):
    model = ConsistencyBC("MlpPolicy", dataset=make_arrays(), dataset_kwargs={"heldout_fraction": 0.3}, **SMALL)
    dumped = []
    monkeypatch.setattr(Logger, "dump", lambda self, step=0: dumped.append((step, dict(self.name_to_value))))
    model.pretrain(3, callback=FittedQEvaluationCallback(gradient_steps=2))
    assert dumped[-1][0] == 3 and "eval/fqe" in dumped[-1][1]


def test_what_it_needs_is_said():
    model = ConsistencyBC("MlpPolicy", dataset=make_arrays(), **SMALL)
    with pytest.raises(DatasetError, match=r"no episodes are held out; load the data with load_dataset\(..., heldout"):
        model.pretrain(1, callback=FittedQEvaluationCallback())
    with pytest.raises(ValueError, match="gradient_steps must be in"):
        fitted_q_evaluation(model, gradient_steps=0)
    with pytest.raises(TypeError, match="unknown 'gradient_step'; did you mean 'gradient_steps'"):
        FittedQEvaluationCallback(gradient_step=3)
    data = make_arrays()
    del data["rewards"]
    model.load_dataset(data, heldout_fraction=0.3)
    with pytest.raises(DatasetError, match="the held-out episodes have no rewards"):
        fitted_q_evaluation(model)
