"""A planner acts: plans, their memory, rewards, scales."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_consistency import RACTD
from sb3_consistency.data.episodes import DatasetError
from tests.conftest import (
    SMALL,
    VectorEnv,
    box_env,
    make_arrays,
    make_planner,
)

OBS = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)


@pytest.mark.parametrize("support", [0.0, 10.0])
def test_rewards_fall_off_the_data(support):
    """Where all returns and all actions are equal, R sees nothing but the distance from them."""
    arrays = make_arrays()
    arrays["actions"][:], arrays["rewards"][:] = 0, 0
    model = make_planner(arrays=arrays, teacher_steps=1, reward_steps=1500, reward_support=support).pretrain(1501)
    batch = next(model.batches(1, 500))
    judge = model.policy.reward_model
    with th.no_grad():
        on, off = (judge(batch.conditions, batch.plans + move).mean() for move in (0, 0.4))
    assert on - off == pytest.approx(1 - np.exp(-support * 0.4**2), abs=0.15)


def test_acting_with_the_teacher_or_more_jumps():
    model = make_planner(teacher_steps=4, reward_steps=2)
    model.pretrain(3)
    with model.planning_with("teacher", 3):
        assert model.can_act
        action = model.predict(OBS, deterministic=True)[0]
        with pytest.raises(RuntimeError, match="teacher stage"):
            model.plan(OBS)
    assert not model.can_act
    np.testing.assert_array_equal(action, model.teacher_plan(OBS, steps=3, deterministic=True)[:, 0])
    model.pretrain(6)
    one = model.predict(OBS, deterministic=True)[0]
    with model.planning_with("student", 2):
        two = model.predict(OBS, deterministic=True)[0]
    np.testing.assert_array_equal(two, model.plan(OBS, deterministic=True, steps=2)[:, 0])
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, model.predict(OBS, deterministic=True)[0])
    with pytest.raises(ValueError, match=r"steps must be .*got 0"):
        model.plan(OBS, steps=0)
    with pytest.raises(ValueError, match="'student' or 'teacher', got 'reward'"), model.planning_with("reward"):
        pass


def test_deterministic_plans_take_no_fresh_noise():
    model = make_planner(teacher_steps=1, reward_steps=1).pretrain(3)
    student = model.policy.student.model
    plans, samples = [], []
    for student.ctm_gamma in (0.0, 1.0):
        plans.append(model.plan(OBS, deterministic=True, steps=4))
        th.manual_seed(0)
        samples.append(model.plan(OBS, steps=4))
    np.testing.assert_array_equal(*plans)
    assert not np.allclose(*samples)


@pytest.mark.parametrize("low_high", [(-1, 1), (5, 7)])
def test_plans_lie_in_the_action_space(low_high):
    space = spaces.Box(*low_high, (2, 2), np.float32)
    arrays = {**make_arrays(action_dim=4), "action_space": space}
    arrays["actions"] = arrays["actions"].reshape(-1, 2, 2) * (low_high[1] - low_high[0]) / 2 + sum(low_high) / 2
    model = make_planner(VectorEnv(action_space=space), arrays).pretrain(5)
    plans = [model.plan(OBS), model.teacher_plan(OBS, steps=2), model.plan(OBS, steps=2)]
    assert all(p.shape == (5, 16, 2, 2) and space.contains(p.reshape(-1, 2, 2)[i]) for p in plans for i in range(80))
    assert model.plan(OBS[0]).shape == (16, 2, 2) and model.predict(OBS[0])[0].shape == (2, 2)
    first = model.plan(OBS, deterministic=True)[:, 0]
    np.testing.assert_allclose(model.predict(OBS, deterministic=True)[0], first, rtol=1e-5)


def test_executing_several_steps_of_a_plan():
    model = make_planner(executed_steps=3).pretrain(5)
    plans, state = [], None
    rng = np.random.default_rng(0)
    for step in range(6):
        obs = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
        if step % 3 == 0:
            plans.append(model.plan(obs, deterministic=True))
        action, state = model.predict(obs, state, np.zeros(2, bool), deterministic=True)
        np.testing.assert_allclose(action, plans[-1][:, step % 3], atol=1e-6)
    # a new episode replans, alone
    obs = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
    _, state = model.predict(obs, state, np.zeros(2, bool), deterministic=True)
    action, _ = model.predict(obs, state, np.array([False, True]), deterministic=True)
    fresh = model.plan(obs, deterministic=True)
    np.testing.assert_allclose(action, np.stack([fresh[0, 1], fresh[1, 0]]), atol=1e-6)


def test_what_predict_is_given_must_be_of_the_same_environments():
    model = make_planner(history=2).pretrain(5)
    with model.planning_with("teacher"):
        with pytest.raises(ValueError, match=r"first entry, as in obs, info = env\.reset"):
            model.predict(box_env().reset())
        state = model.predict(np.zeros((3, 3)))[1]
        with pytest.raises(ValueError, match="state is of 3 environment"):
            model.predict(np.zeros((2, 3)), state)
        with pytest.raises(ValueError, match="episode_start is of 1 environment"):
            model.predict(np.zeros((3, 3)), state, np.array([False]))


def test_history_shifts_and_starts_anew():
    model = make_planner(history=2).pretrain(5)
    one, two = OBS[:2], OBS[2:4]
    _, state = model.predict(one)
    _, state = model.predict(two, state, np.array([False, True]))
    np.testing.assert_array_equal(state.history[0], np.stack([one[0], two[0]]))
    np.testing.assert_array_equal(state.history[1], np.stack([two[1], two[1]]))
    mean, _ = evaluate_policy(model, make_vec_env(box_env, n_envs=2), n_eval_episodes=2)
    assert np.isfinite(mean)


def test_several_environments_and_vec_normalize():
    env = VecNormalize(make_vec_env(box_env, n_envs=2))
    model = RACTD("MlpPolicy", env, **SMALL)
    model.load_dataset(make_arrays())
    model.pretrain(5)
    batch = next(model.batches(1, 64))
    assert batch.conditions.shape == (64, 1, 3) and batch.conditions.abs().max() < 10  # normalised: raw ones reach 5000
    assert evaluate_policy(model, env, n_eval_episodes=2)[0] < 0


def test_heldout_loss_is_of_windows_that_training_does_not_see():
    model = RACTD("MlpPolicy", box_env(), **SMALL)
    model.load_dataset(make_arrays(), heldout_fraction=0.34)
    assert len(model.data.windows()) == 80 and len(model.data.heldout["windows"]) == 40
    model.pretrain(20)
    assert model.data.heldout_loss() == model.data.heldout_loss() > 0


def test_held_out_episodes_have_windows_for_every_environment():
    model = RACTD("MlpPolicy", make_vec_env(box_env, n_envs=8), **SMALL)
    arrays = make_arrays(n_episodes=4, length=3)
    with pytest.raises(DatasetError, match=r"heldout_fraction: .* 3 transition\(s\).*environments \(8\)"):
        model.load_dataset(arrays, heldout_fraction=0.25)
    assert model.replay_buffer.size() == 0  # nothing has changed


def test_observations_and_returns_are_scaled_to_the_unit_box():
    model = make_planner()
    batch = next(model.batches(1, 2000))
    cond = model.policy.student.condition(batch.conditions)
    assert cond.min().item() == pytest.approx(-1, abs=0.01) and cond.max().item() == pytest.approx(1, abs=0.01)
    assert batch.returns.min().item() == pytest.approx(-1, abs=0.01) and batch.returns.max().item() == pytest.approx(
        1, abs=0.01
    )
    assert batch.plans.abs().max() <= 1 and batch.plans.shape == (2000, 16, 1)
