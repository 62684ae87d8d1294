"""Plans of states: learned, tracked, and rewarded near the data."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_consistency import RACTD
from sb3_consistency.planning.tracking import forces, planned_states
from tests.conftest import (
    SMALL,
    box_env,
    make_planner,
)


class PointEnv(gym.Env):
    """A point with inertia that is to reach one goal after the other."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict(
        {"observation": spaces.Box(-np.inf, np.inf, (4,)), "desired_goal": spaces.Box(-np.inf, np.inf, (2,))}
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.goal, self.t = np.zeros(4), self.np_random.uniform(-1, 1, 2), 0
        return self.observe(), {}

    def observe(self):
        return {"observation": self.state.astype(np.float32), "desired_goal": self.goal.astype(np.float32)}

    def step(self, action):
        self.t += 1
        self.state[2:] = 0.9 * self.state[2:] + 0.1 * action
        self.state[:2] += self.state[2:]
        reached = np.linalg.norm(self.state[:2] - self.goal) < 0.1
        if reached:
            self.goal = self.np_random.uniform(-1, 1, 2)
        return self.observe(), float(reached), False, self.t >= 100, {}


def point_data(n_steps=400):
    env, rows = PointEnv(), []
    obs, _ = env.reset(seed=0)
    for _ in range(n_steps):
        action = np.clip(3 * (obs["desired_goal"] - obs["observation"][:2]) - 6 * obs["observation"][2:], -1, 1)
        after, reward, _, end, _ = env.step(action)
        rows.append((obs, action, reward, after, False, end))
        obs = env.reset()[0] if end else after
    keys = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    arrays = dict(zip(keys, zip(*rows, strict=True), strict=True))
    for key in ("observations", "next_observations"):
        arrays[key] = {k: np.stack([o[k] for o in arrays[key]]) for k in ("observation", "desired_goal")}
    return {key: value if isinstance(value, dict) else np.array(value) for key, value in arrays.items()}


@pytest.fixture(scope="module")
def pointer():
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", horizon=16, **SMALL)
    model.load_dataset(point_data())
    return model.pretrain(10)


def test_rewards_are_capped_at_the_best_of_the_data(pointer):
    stacked = th.zeros(2, 4)[None].expand(5, -1, -1)
    for model, plans, expected in [(pointer, th.zeros(5, 16, 4), 16), (make_planner(), th.zeros(5, 16, 1), 1)]:
        network = copy.deepcopy(model.policy.reward_model)
        nn.init.zeros_(network.value_net.layers[-1].weight)
        nn.init.constant_(network.value_net.layers[-1].bias, 3.0)
        observations = stacked if expected == 16 else th.zeros(5, 1, 3)
        assert network(observations, plans).tolist() == 5 * [expected]
        assert network.judge(network.condition(observations), plans).tolist() == 5 * [3 * expected]


def test_rewards_of_states_fall_off_the_data():
    arrays = point_data()
    arrays["rewards"][:] = 0
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", horizon=16, teacher_steps=1, reward_steps=1500, **SMALL)
    model.load_dataset(arrays)
    model.pretrain(1501)
    batch = next(model.batches(1, 500))
    with th.no_grad():
        on, off = (
            model.policy.reward_model(batch.reward_conditions, s).mean() for s in (batch.plans[:, :1], 3 * th.ones(500, 1, 4))
        )
    assert on - off > 0.6  # of 1: that state is at least 2 away from all others, in every dimension


def test_plans_of_states_are_learned_at_higher_noise_levels(pointer):
    for network in (pointer.policy.teacher_model, pointer.policy.student):
        assert (network.model.p_mean, network.model.p_std) == (0.0, 1.6)
    assert make_planner().policy.student.model.p_mean == -1.2
    policy_kwargs = {**SMALL["policy_kwargs"], "model_kwargs": {"p_mean": -1.0}}
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", **{**SMALL, "policy_kwargs": policy_kwargs})
    assert (model.policy.teacher_model.model.p_mean, model.policy.teacher_model.model.p_std) == (-1.0, 1.6)


def test_windows_of_states_end_in_their_condition(pointer):
    batch = next(pointer.batches(1, 500))
    normalise = pointer.policy.student.obs_normalizer
    assert batch.plans.shape == (500, 16, 4) and batch.plans.abs().max() <= 1 + 1e-5
    assert th.allclose(normalise(batch.conditions)[:, 0], batch.plans[:, 0])
    assert th.allclose(normalise(batch.conditions)[:, 1], batch.plans[:, -1])
    # what waits at the end of a trajectory is at rest
    padded = (batch.plans[:, -1, :2] == batch.plans[:, -2, :2]).all(dim=1)
    assert padded.any() and (batch.conditions[padded, 1, 2:] == 0).all()
    # the reward model is told the goal of the environment
    assert batch.reward_conditions.shape == (500, 2, 4) and (batch.reward_conditions[:, 1, 2:] == 0).all()


def test_rewards_of_states_know_goals_at_rest_only(pointer):
    batch = next(pointer.batches(1, 500))
    moving, at_rest = batch.conditions.clone(), batch.conditions.clone()
    moving[:, 1, 2:], at_rest[:, 1, 2:] = 0.5, 0
    student, reward_model = pointer.policy.student, pointer.policy.reward_model
    assert not th.equal(student.condition(moving), student.condition(at_rest))
    assert th.equal(reward_model(moving, batch.plans), reward_model(at_rest, batch.plans))


@pytest.mark.parametrize(("executed_steps", "age"), [(None, 5), (5, 0), (100, 20)])
def test_a_plan_of_states_is_renewed_when_it_is_over(executed_steps, age, tmp_path):
    options = {"plan_of": "states", "horizon": 16, "executed_steps": executed_steps, "teacher_steps": 1, "reward_steps": 1}
    model = RACTD("MultiInputPolicy", PointEnv(), **options, **SMALL)
    model.load_dataset(point_data())
    model.pretrain(3).save(tmp_path / "model")
    model = RACTD.load(tmp_path / "model")
    obs, _ = PointEnv().reset(seed=3)
    _, state = model.predict(obs)
    first = state.plan
    for _ in range(20):
        _, state = model.predict(obs, state, np.array([False]))
    assert state.age.tolist() == [age]  # a plan of 16 states has 15 moves; more of them hold its end
    assert np.array_equal(state.plan, first) == (executed_steps == 100)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_actions_have_the_shape_of_their_space(shape):
    class Shaped(PointEnv):
        action_space = spaces.Box(-1, 1, shape, np.float32)

    data = point_data(100)
    data["actions"] = np.reshape(data["actions"], (-1, *shape))
    model = RACTD("MultiInputPolicy", Shaped(), plan_of="states", horizon=8, teacher_steps=1, reward_steps=1, **SMALL)
    model.load_dataset(data)
    model.pretrain(3)
    obs, _ = PointEnv().reset(seed=0)
    batch = {key: np.stack(3 * [x]) for key, x in obs.items()}
    assert model.predict(obs)[0].shape == shape and model.predict(batch)[0].shape == (3, *shape)


def test_own_extractors_are_refused():
    policy_kwargs = {**SMALL["policy_kwargs"], "features_extractor_class": NatureCNN}
    with pytest.raises(ValueError, match=r"features_extractor_class must be left out with plan_of='states'.*NatureCNN"):
        RACTD("MultiInputPolicy", PointEnv(), plan_of="states", **{**SMALL, "policy_kwargs": policy_kwargs})


def test_between_planned_states_lies_the_line_that_joins_them():
    plans = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    for steps, expected in [
        ([0, 3], [plans[0, 0], plans[1, 1]]),
        ([1, 5], [plans[0, 0] + 4 / 3, plans[1, 1] + 8 / 3]),
        ([6, 7], [plans[0, 2], [*plans[1, 2, :2], 0, 0]]),  # the end, and at rest beyond it
    ]:
        np.testing.assert_allclose(planned_states(plans, np.array(steps), 3), expected, rtol=1e-6)
    np.testing.assert_allclose(forces(plans[:1, 0], plans[:1, 1], (2.0, 0.5)), [[10, 10]])


def test_plans_with_a_stride_reach_further(tmp_path):
    options = {"plan_of": "states", "horizon": 8, "stride": 3, "teacher_steps": 1, "reward_steps": 1}
    model = RACTD("MultiInputPolicy", PointEnv(), **options, **SMALL)
    model.load_dataset(point_data())
    windows = model.pretrain(3).data.windows()
    at = windows.at(windows.starts[:500])
    inside = ~at.padded.any(axis=1)
    np.testing.assert_array_equal(at.rows[inside], at.rows[inside, :1] + 3 * np.arange(8))
    states = th.as_tensor(model.replay_buffer.observations["observation"][at.rows, at.columns])[inside]
    windows.sample = lambda *_: at
    (batch,) = model.data.sample(1, len(at.rows))
    assert th.allclose(batch.plans[inside], model.policy.student.obs_normalizer(states))
    assert th.allclose(batch.conditions[inside], states[:, [0, -1]])
    model.save(tmp_path / "model")
    loaded, (obs, _) = RACTD.load(tmp_path / "model"), PointEnv().reset(seed=3)
    plan = loaded.plan(obs, deterministic=True)
    action, state = loaded.predict(obs, deterministic=True)
    target = plan[0] + (plan[1] - plan[0]) / 3
    expected = (target - obs["observation"])[:2] + (target - obs["observation"])[2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)
    ages = []
    for _ in range(22):
        _, state = loaded.predict(obs, state, np.array([False]))
        ages.append(int(state.age[0]))
    assert ages == [*range(1, 21), 0, 1]  # 8 states are 7 moves of 3 steps
    with pytest.raises(ValueError, match="stride=3"):
        RACTD("MultiInputPolicy", PointEnv(), teacher=str(tmp_path / "model.zip"), **{**options, "stride": 2}, **SMALL)


def test_plans_of_states_are_tracked(pointer, tmp_path, monkeypatch):
    env = PointEnv()
    obs, _ = env.reset(seed=3)
    plan = pointer.plan(obs, deterministic=True)
    assert plan.shape == (16, 4) and pointer.teacher_plan(obs, steps=2).shape == (16, 4)
    action, state = pointer.predict(obs, deterministic=True)
    expected = plan[1, :2] - obs["observation"][:2] + plan[1, 2:] - obs["observation"][2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)
    for _ in range(14):
        obs = {**obs, "observation": obs["observation"] + 0.01}
        action, state = pointer.predict(obs, state, np.array([False]), deterministic=True)
    assert state.age.tolist() == [14]  # one plan, to its last state
    expected = plan[-1, :2] - obs["observation"][:2] + plan[-1, 2:] - obs["observation"][2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)
    pointer.executed_steps = 100
    action, state = pointer.predict(obs, state, np.array([False]), deterministic=True)
    expected = plan[-1, :2] - obs["observation"][:2] - obs["observation"][2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)  # held at rest
    obs = {**obs, "desired_goal": obs["desired_goal"] + 0.5}
    _, state = pointer.predict(obs, state, np.array([False]), deterministic=True)
    assert state.age.tolist() == [0]  # a new goal, a new plan
    pointer.save(tmp_path / "model")
    loaded = RACTD.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], pointer.predict(obs, deterministic=True)[0])
    assert np.isfinite(evaluate_policy(pointer, make_vec_env(PointEnv, n_envs=2), n_eval_episodes=2)[0])


def test_uncut_windows_of_states():
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", horizon=16, cut_at_goals=False, pad=False, **SMALL)
    model.load_dataset(point_data())
    assert len(model.data.windows()) == 400 - 4 * 15
    model.pretrain(6)


def test_plans_of_states_need_states():
    with pytest.raises(ValueError, match=r"plan_of='states'.*desired_goal"):
        RACTD("MlpPolicy", box_env(), plan_of="states", **SMALL)
    with pytest.raises(ValueError, match="normalize_observations"):
        RACTD("MultiInputPolicy", PointEnv(), plan_of="states", normalize_observations=False, **SMALL)
    with pytest.raises(ValueError, match="history"):
        RACTD("MultiInputPolicy", PointEnv(), plan_of="states", history=2, **SMALL)


def test_data_that_is_refused_leaves_the_range_of_returns():
    env = VecNormalize(make_vec_env(PointEnv, n_envs=1))
    model = RACTD("MultiInputPolicy", env, plan_of="states", horizon=4, **SMALL)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(ValueError, match=r"use VecNormalize\(norm_obs=False\)"):
        model.load_dataset({**point_data(60), "rewards": np.linspace(0, 9, 60)})
    assert all(th.equal(before[name], weight) for name, weight in model.policy.state_dict().items())
    assert model.data.buffer is None
