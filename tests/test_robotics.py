"""Environments of Gymnasium-Robotics: those that MuJoCo 4 can't make are skipped here and run by `make robotics`."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_consistency import CPQL, RACTD
from sb3_consistency.data.record import record_dataset
from tests.conftest import SMALL

robotics = pytest.importorskip("gymnasium_robotics", reason="needs the extra mujoco")
gym.register_envs(robotics)


def recorded(env_id):
    try:
        env = gym.make(env_id, max_episode_steps=6)
        env.reset(seed=0)
    except Exception as error:
        pytest.skip(f"{env_id} can't be made with this MuJoCo (make robotics installs 3.3.7): {error!r}")
    env.action_space.seed(0)
    record_dataset("test/robotics-v0", env, lambda obs: env.action_space.sample(), 12)
    return "test/robotics-v0"


@pytest.mark.parametrize("env_id", ["FrankaKitchen-v1", "FetchReach-v4", "PointMaze_UMaze-v3"])
def test_recorded_goals_load_pretrain_and_go_online(env_id, minari_folder):
    model = CPQL.from_dataset(recorded(env_id), **SMALL)
    assert model.replay_buffer.size() == 12
    if env_id == "FrankaKitchen-v1":
        assert "achieved_goal/kettle" in model.observation_space.spaces
    model.pretrain(2)
    model.learn(3)
    obs = model.env.reset()
    assert np.isfinite(model.predict(obs, deterministic=True)[0]).all()


@pytest.mark.parametrize(
    ("env_id", "options"), [("FrankaKitchen-v1", {}), ("FetchReach-v4", {}), ("PointMaze_UMaze-v3", {"plan_of": "states"})]
)
def test_planners_plan_from_goals(env_id, options, minari_folder):
    model = RACTD.from_dataset(recorded(env_id), **{**SMALL, **options}).pretrain(30)
    returns = evaluate_policy(model, model.env, n_eval_episodes=1, return_episode_rewards=True)
    assert np.isfinite(returns[0]).all()
    plan = model.plan(model.env.reset())
    assert plan.shape == ((1, 16, 4) if options else (1, 16, *model.action_space.shape))
    if not options:
        assert (np.abs(plan) <= 1).all()


def test_its_environments_are_known_without_importing_it():
    code = "import gymnasium; from sb3_consistency.envs.wrappers import make_known; make_known('PointMaze_UMaze-v3'); "
    subprocess.run([sys.executable, "-c", code + "gymnasium.spec('PointMaze_UMaze-v3')"], check=True)
