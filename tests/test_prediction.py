"""Predictions: shapes, bounds, what deterministic means, candidates."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_consistency import RACTD, ConsistencyAC
from tests.conftest import (
    ACTOR_CRITICS,
    ALGORITHMS,
    SMALL,
    VectorEnv,
    actor_critics,
    assert_same,
    box_env,
    every,
    make,
    trained,
)

OBS = np.zeros((4, 3), np.float32)


@every
def test_predictions_have_the_shapes_of_the_observations(cls):
    model = trained(cls)
    env = make_vec_env(box_env, n_envs=3)
    assert model.predict(OBS[0])[0].shape == (1,) and model.predict(OBS)[0].shape == (4, 1)
    assert model.predict(env.reset(), deterministic=True)[0].shape == (3, 1)
    with pytest.raises(ValueError, match="shape"):
        model.predict(np.zeros((4, 7), np.float32))
    with pytest.raises(ValueError, match=r"gymnasium\.Env|tuple"):
        model.predict((OBS[0], {}))  # what reset() returns
    with pytest.raises(ValueError, match=r"gymnasium\.Env|tuple"):
        model.plan((OBS[0], {}))


@every
@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 0.5]), dtype=np.float64),
        spaces.Box(5, 7, (1,), np.float32),
    ],
)
def test_predictions_lie_in_any_box(cls, space):
    if cls is RACTD:
        pytest.skip("a planner does not act before its student stage; test_ractd.py has this test after training")
    model = cls("MlpPolicy", VectorEnv(action_space=space), **SMALL)
    obs = np.random.default_rng(0).normal(size=(50, 3))  # float64
    for deterministic in (True, False):
        actions, _ = model.predict(obs, deterministic=deterministic)
        assert actions.shape == (50, *space.shape) and all(space.contains(a.astype(space.dtype)) for a in actions)
    assert model.predict(obs[0])[0].shape == space.shape


@actor_critics
def test_predictions_for_no_observation(cls):
    model = make(cls)
    for deterministic in (True, False):
        assert model.predict(np.zeros((0, 3), np.float32), deterministic=deterministic)[0].shape == (0, 1)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_deterministic_prediction_is_a_function_of_the_observation(cls):
    model = trained(cls)
    obs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    batch = model.predict(obs, deterministic=True)[0]
    th.manual_seed(3)
    np.testing.assert_array_equal(batch, model.predict(obs, deterministic=True)[0])
    rows = np.stack([model.predict(o, deterministic=True)[0] for o in obs])
    np.testing.assert_allclose(batch, rows, atol=1e-5)
    assert not np.allclose(model.predict(obs)[0], model.predict(obs)[0])
    assert model.policy.actor.fixed_noise(1, model.device).abs().min() > 0


@pytest.mark.parametrize(
    ("cls", "options", "near_scale"),
    [*((cls, {}, 0.5) for cls in ALGORITHMS), *((cls, {"n_eval_candidates": 10}, 0.2) for cls in ACTOR_CRITICS)],
)
def test_deterministic_prediction_is_near_the_middle_of_the_samples(cls, options, near_scale, tmp_path):
    obs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)

    def actions(noise_scale):
        policy_kwargs = {**SMALL["policy_kwargs"], "noise_scale": noise_scale, "noise_seed": 7}
        model = cls("MlpPolicy", VectorEnv(), **{**SMALL, **options, "policy_kwargs": policy_kwargs})
        model.save(tmp_path / "model")
        return cls.load(tmp_path / "model").policy.predict(obs, deterministic=True)[0]

    middle, near, sample = (actions(scale) for scale in (1e-6 if options else 0.0, near_scale, 1.0))
    assert 0 < np.abs(near - middle).mean() < np.abs(sample - middle).mean()
    with pytest.raises(ValueError, match="noise_scale"):
        actions(-0.1)


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
@pytest.mark.parametrize("selection", ["softmax", "argmax"])
def test_candidates_raise_the_value(cls, selection):
    env = VectorEnv()
    one = cls("MlpPolicy", env, n_candidates=1, **SMALL)
    many = cls("MlpPolicy", env, n_candidates=50, candidate_selection=selection, candidate_temperature=1e-3, **SMALL)
    many.policy.load_state_dict(one.policy.state_dict())
    obs = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)

    def value(model, deterministic=False):
        actions = th.as_tensor(model.predict(obs, deterministic=deterministic)[0])
        return one.critic_target(th.as_tensor(obs), actions).amin(dim=1).mean().item()

    assert value(many) > value(one)
    best_of_bank = cls("MlpPolicy", env, n_eval_candidates=20, **SMALL)
    best_of_bank.policy.load_state_dict(one.policy.state_dict())
    assert value(best_of_bank, True) > value(one, True)
    np.testing.assert_array_equal(
        best_of_bank.predict(obs, deterministic=True)[0], best_of_bank.predict(obs, deterministic=True)[0]
    )


@every
def test_predicting_does_not_disturb_the_training(cls):
    quiet, busy = trained(cls), trained(cls)
    random_state = th.get_rng_state(), np.random.get_state()
    for model in (quiet, busy):
        th.set_rng_state(random_state[0])
        np.random.set_state(random_state[1])
        if model is busy:
            model.predict(OBS, deterministic=True)
        model.pretrain(3)
    assert_same(quiet, busy)


@every
def test_evaluate_policy_and_devices(cls, tmp_path):
    model = trained(cls)
    mean, deviation = evaluate_policy(model, make_vec_env(box_env, n_envs=2), n_eval_episodes=3, deterministic=True)
    assert -10 <= mean <= 0 and deviation >= 0
    assert model.device == th.device("cpu") and model.policy.device == th.device("cpu")
    model.policy.to("meta")  # a device that every machine has
    assert model.policy.device == th.device("meta")


def test_an_actor_asked_alone_goes_on_training(monkeypatch):
    model = make(ConsistencyAC, policy_kwargs={"network": "ln_resnet", "net_arch": [32]}).pretrain(1)
    modes = []
    loss = model.actor_loss
    monkeypatch.setattr(model, "actor_loss", lambda batch: modes.append(model.actor.training) or loss(batch))
    model.updater.forget()
    model.actor.predict(np.zeros(3, np.float32))
    assert not model.actor.training and model.policy.training
    model.pretrain(1)
    assert modes == [True]
