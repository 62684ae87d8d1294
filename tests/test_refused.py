"""What can't work is refused at once, by the name of the argument, with what to do instead."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_consistency import CPQL, RACTD, ConsistencyBC, UnsupportedSpaceError, load_safe
from tests.conftest import SMALL, VectorEnv, make, make_arrays

IMAGE = spaces.Box(0, 255, (40, 40, 3), np.uint8)
PETTING_ZOO = type(
    "PettingZooEnv", (), {"possible_agents": ["a"], "action_space": lambda agent: None, "observation_space": None}
)()


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        (lambda: VectorEnv(), TypeError, "env: <function .* is no environment: call it"),
        ([VectorEnv()], TypeError, r"env: .* is no environment: .*make_vec_env"),
        (PETTING_ZOO, TypeError, "env: .* environments of one agent"),
        (3, TypeError, "env: 3 is no environment: pass a Gymnasium environment"),
        (VecFrameStack(VecNormalize(DummyVecEnv([VectorEnv])), 2), ValueError, "VecNormalize must be the outermost wrapper"),
        (VecNormalize(DummyVecEnv([lambda: VectorEnv(IMAGE)]), norm_obs=False), ValueError, "channels first"),
        (
            VectorEnv(spaces.MultiDiscrete([[2, 3], [4, 5]])),
            UnsupportedSpaceError,
            "MultiDiscrete observations of one dimension",
        ),
    ],
)
def test_environments(env, error, message):
    with pytest.raises(error, match=message):
        CPQL("MlpPolicy", env, **SMALL)


@pytest.mark.parametrize("way", ["set_env", "load", "load_safe"])
def test_environments_of_a_model_that_is_there(way, tmp_path):
    model = CPQL("MlpPolicy", VectorEnv(), **SMALL)
    model.save(tmp_path / "model")
    take = {
        "set_env": model.set_env,
        "load": lambda env: CPQL.load(tmp_path / "model", env),
        "load_safe": lambda env: load_safe(model.save_safe(tmp_path / "model"), env),
    }[way]
    with pytest.raises(TypeError, match=r"env: .* is no environment: .*make_vec_env"):
        take([VectorEnv()])


@pytest.mark.parametrize("log_interval", [0, -2, 2.5])
def test_log_intervals(log_interval):
    model = make(ConsistencyBC)
    for call in (model.learn, model.pretrain):
        with pytest.raises((TypeError, ValueError), match="log_interval must be"):
            call(3, log_interval=log_interval)
    assert model.n_updates == 0


class ScalarRewards(BitFlippingEnv):
    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.float32(0.0 if np.array_equal(achieved_goal, desired_goal) else -1.0)


class ConditionalRewards(BitFlippingEnv):
    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.float32(-1.0 if np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0 else 0.0)


@pytest.mark.parametrize("cls", [ScalarRewards, ConditionalRewards])
def test_rewards_of_one_goal_at_a_time(cls):
    env = cls(n_bits=4, continuous=True)
    model = CPQL("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=10, **SMALL)
    with pytest.raises(ValueError, match=r"env: .*compute_reward.* it must return n rewards"):
        model.learn(20)


def test_policy_and_environment_in_the_wrong_order():
    with pytest.raises(TypeError, match=r"policy: got an environment: write CPQL\('MlpPolicy', env\)"):
        CPQL(gym.make("Pendulum-v1"), "MlpPolicy")


@pytest.mark.parametrize("arch", [8, (8, 8), ["8"], [0], [{"pi": [8], "qf": [8]}], {"pi": [8], "vf": [8]}, {"pi": [8]}])
@pytest.mark.parametrize("cls", [CPQL, RACTD])
def test_layer_sizes(cls, arch):
    with pytest.raises(ValueError, match=r"net_arch must be a list of layer sizes .* got"):
        cls("MlpPolicy", dataset=make_arrays(), policy_kwargs={"net_arch": arch})


def test_arguments_of_load_dataset():
    model = CPQL("MlpPolicy", dataset=make_arrays(), **SMALL)
    with pytest.raises(TypeError, match=r"load_dataset\(\): unknown 'top_frac'; did you mean 'top_fraction'"):
        model.load_dataset(make_arrays(), top_frac=0.5)


def test_a_planner_that_was_never_trained_says_so():
    model = RACTD("MlpPolicy", dataset=make_arrays(), **SMALL)
    with pytest.raises(RuntimeError, match="has not been trained: learn"):
        model.predict(np.zeros(3, np.float32))


def test_an_export_without_the_statistics_that_the_model_learned_with(tmp_path):
    model = CPQL("MlpPolicy", VecNormalize(DummyVecEnv([VectorEnv])), learning_starts=5, **SMALL)
    model.learn(20)
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "safe")
    for loaded in (CPQL.load(tmp_path / "model"), CPQL.load_safe(tmp_path / "safe")):
        with pytest.raises(ValueError, match=r"env: this CPQL learned from observations that VecNormalize normalised"):
            loaded.export(tmp_path / "policy.pt")
        assert not (tmp_path / "policy.pt").exists()
    CPQL.load(tmp_path / "model", env=VecNormalize(DummyVecEnv([VectorEnv]))).export(tmp_path / "policy.pt")
