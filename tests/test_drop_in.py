"""Behaviours that SB3's own tests demand of TD3 and SAC, for every algorithm; docs/reliability.md maps them to tests."""

import io
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from torch import nn

from sb3_consistency import CPQL, RACTD, ConsistencyAC
from sb3_consistency.training.arguments import NOT_OURS
from tests.conftest import SMALL, VectorEnv, make_arrays
from tests.test_contract import actor_critics, assert_same, box_env, every, make, trained
from tests.test_loading import GoalEnv

IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
OBS = np.zeros((4, 3), np.float32)


def online(cls, env=None, policy="MlpPolicy", **kwargs):
    return cls(policy, env or box_env(), **{**SMALL, "learning_starts": 5, "buffer_size": 200, **kwargs})


# --- test_run, test_predict, test_deterministic, test_identity (tests/test_learning.py learns)


@actor_critics
@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise(cls, noise, n_envs):
    env = make_vec_env(box_env, n_envs=n_envs)
    model = online(cls, env, action_noise=noise(np.zeros(1), 10 * np.ones(1))).learn(30)
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)
    actions = model.replay_buffer.actions[5 : model.replay_buffer.size()]
    assert np.abs(actions).max() <= 1 and (np.abs(actions) == 1).mean() > 0.5  # strong noise, clipped to the bounds


@actor_critics
@pytest.mark.parametrize(
    ("kwargs", "n_updates"),
    [
        ({"train_freq": 4, "gradient_steps": 2}, 6),
        ({"train_freq": (1, "episode"), "gradient_steps": -1}, 15),
        ({"train_freq": [1, "episode"], "gradient_steps": -1}, 15),
        ({"train_freq": 2, "gradient_steps": -1}, 14),
        ({"gradient_steps": 0}, 0),
    ],
)
def test_train_freq_and_gradient_steps(cls, kwargs, n_updates):
    model = online(cls, box_env(length=5), **kwargs).learn(20)
    assert model.num_timesteps == 20 and model._n_updates == pytest.approx(n_updates, abs=2)


def test_episodes_need_one_environment():
    model = online(CPQL, make_vec_env(box_env, n_envs=2), train_freq=(1, "episode"))
    with pytest.raises(AssertionError, match="episodic"):
        model.learn(10)


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


@actor_critics
def test_the_same_seed_online_gives_the_same_weights(cls):
    assert_same(online(cls).learn(40), online(cls).learn(40))


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


# --- test_save_load


@every
def test_files_and_what_load_takes(cls, tmp_path, capsys):
    model = trained(cls)
    buffer = io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    assert_same(model, cls.load(buffer))
    for path in (tmp_path / "a", str(tmp_path / "b.zip")):
        model.save(path)
        assert_same(model, cls.load(path, device="cpu", print_system_info=True))
    assert "CURRENT SYSTEM INFO" in capsys.readouterr().out
    loaded = cls.load(tmp_path / "a", custom_objects={"learning_rate": 0.5, "lr_schedule": lambda progress: 0.5})
    assert loaded.learning_rate == 0.5
    with pytest.raises(FileNotFoundError):
        cls.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="spaces do not match"):
        cls.load(tmp_path / "a", env=VectorEnv())


@every
def test_excluded_and_included_attributes(cls, tmp_path):
    model = trained(cls)
    model.save(tmp_path / "model", exclude=["seed"], include=["replay_buffer"])
    loaded = cls.load(tmp_path / "model")
    assert loaded.seed is None and loaded.replay_buffer.size() == 120


@every
def test_some_parameters_alone(cls):
    model, other = trained(cls), trained(cls, seed=1)
    policy = other.get_parameters()["policy"]
    name = next(iter(policy))
    with pytest.raises(RuntimeError):
        model.set_parameters({"policy": {name: policy[name]}})
    model.set_parameters({"policy": {name: policy[name]}}, exact_match=False)
    assert th.equal(model.policy.state_dict()[name], policy[name])


@every
def test_set_env(cls):
    model = trained(cls)
    env = box_env()
    model.set_env(env)
    assert model.get_env().envs[0].unwrapped is env
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(box_env, n_envs=2))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(VectorEnv())


@actor_critics
def test_replay_buffers_are_saved_and_loaded(cls, tmp_path):
    for env, policy, kwargs in (
        (box_env(), "MlpPolicy", {}),
        (GoalEnv(), "MultiInputPolicy", {"replay_buffer_class": HerReplayBuffer}),
    ):
        model = online(cls, env, policy, **kwargs).learn(25)
        before = deepcopy(model.replay_buffer.rewards)
        model.save_replay_buffer(tmp_path / "buffer")
        fresh = online(cls, env, policy, **kwargs)
        fresh.load_replay_buffer(tmp_path / "buffer")
        np.testing.assert_array_equal(fresh.replay_buffer.rewards, before)
        fresh.learn(15, reset_num_timesteps=False)


# --- test_dict_env, test_cnn, test_spaces


@actor_critics
def test_memory_efficient_buffer_online(cls):
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = online(cls, buffer_size=20, **kwargs).learn(50)  # wraps around
    assert model.replay_buffer.full and model._n_updates > 30
    with pytest.raises(ValueError, match="DictReplayBuffer"):
        online(cls, GoalEnv(), "MultiInputPolicy", **kwargs)


class ImageEnv(VectorEnv):
    """Images whose first channel alone is white, in any order of the axes."""

    def __init__(self, channels_last=True):
        shape = (36, 36, 3) if channels_last else (3, 36, 36)
        super().__init__(spaces.Box(0, 255, shape, np.uint8))
        self.channels_last = channels_last

    def image(self):
        image = np.zeros((36, 36, 3), np.uint8)
        image[..., 0] = 255
        return image if self.channels_last else image.transpose(2, 0, 1)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.image(), {}

    def step(self, action):
        return self.image(), *super().step(action)[1:]


@actor_critics
@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_come_first(cls, channels_last):
    model = online(cls, ImageEnv(channels_last), "CnnPolicy", buffer_size=30).learn(12)
    assert model.observation_space.shape == (3, 36, 36)
    assert isinstance(model.get_env(), VecTransposeImage) == channels_last
    stored = model.replay_buffer.observations[:12, 0]
    assert stored.dtype == np.uint8 and (stored[:, 0] == 255).all() and (stored[:, 1:] == 0).all()
    seen = []
    model.actor.features_extractor.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    action, _ = model.predict(ImageEnv(channels_last).image(), deterministic=True)
    assert action.shape == (2,) and seen[0][0, 0].unique().tolist() == [1.0]  # divided by 255


@every
def test_frame_stack(cls):
    env = VecFrameStack(make_vec_env(ImageEnv, n_envs=1), n_stack=2)
    collector = online(CPQL, env, "CnnPolicy", buffer_size=30).learn(12)
    model = cls("CnnPolicy", env, buffer_size=30, **SMALL)
    model.load_dataset(collector.replay_buffer)
    model.pretrain(4)
    assert model.observation_space.shape == (6, 36, 36)
    assert model.predict(env.reset(), deterministic=True)[0].shape == (1, 2)


def test_images_that_are_normalised_already():
    space = spaces.Box(0, 1, (3, 36, 36), np.float32)
    model = online(CPQL, VectorEnv(space), "CnnPolicy", buffer_size=20, policy_kwargs={"normalize_images": False}).learn(8)
    assert not model.policy.normalize_images
    with pytest.raises(AssertionError, match="normalize_images"):
        online(CPQL, VectorEnv(space), "CnnPolicy", buffer_size=20)


# --- test_custom_policy, test_train_eval_mode


class BatchNormExtractor(BaseFeaturesExtractor):
    """Remembers in which mode it was called."""

    def __init__(self, observation_space, features_dim=6):
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(nn.Linear(3, features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


BATCH_NORM = {
    "features_extractor_class": BatchNormExtractor,
    "features_extractor_kwargs": {"features_dim": 4},
    "net_arch": [16],
}


@every
@pytest.mark.parametrize("shared", [False, True])
def test_own_extractor_with_batch_norm(cls, shared, tmp_path):
    if cls is RACTD and shared:
        pytest.skip("the networks of a planner share no extractor")
    model = make(cls, policy_kwargs={**BATCH_NORM, **({"share_features_extractor": True} if shared else {})})
    norm = model.policy.actor.features_extractor.layers[1]
    untrained = norm.running_mean.clone()
    model.pretrain(8)
    assert not th.equal(norm.running_mean, untrained)
    before = norm.running_mean.clone()
    first, second = (model.predict(OBS, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)  # neither dropout nor new statistics
    assert th.equal(norm.running_mean, before) and not model.policy.training
    for network, target in model.policy.target_pairs():
        if cls is not RACTD:  # whose teacher is not in training any more
            assert th.equal(_statistics(network), _statistics(target))
        assert not target.training
    model.save(tmp_path / "model")
    assert_same(model, cls.load(tmp_path / "model"))


def _statistics(network):
    return network.features_extractor.layers[1].running_mean


@actor_critics
def test_statistics_stay_while_experience_is_collected(cls):
    model = make(cls, policy_kwargs=BATCH_NORM).pretrain(2)
    model.gradient_steps = 0
    before = _statistics(model.actor).clone()
    model.learn(20)
    assert th.equal(_statistics(model.actor), before)
    model.gradient_steps = 1
    model.learn(5)
    assert not th.equal(_statistics(model.actor), before)


@every
@pytest.mark.parametrize("net_arch", [[4], [4, 4], {"pi": [4], "qf": [5]}])
def test_architectures_optimizers_and_schedules(cls, net_arch):
    kwargs = {"net_arch": net_arch, "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}
    model = trained(cls, policy_kwargs={**kwargs, "activation_fn": nn.ELU}, learning_rate=lambda progress: 1e-3 * progress)
    for name in model.policy.trained_networks():
        optimizer = getattr(model.policy, name).optimizer
        assert type(optimizer) is th.optim.RMSprop and optimizer.param_groups[0]["alpha"] == 0.9
    assert any(isinstance(m, nn.ELU) for m in model.policy.actor.modules())


def test_unknown_policy_arguments_are_told():
    with pytest.raises(TypeError, match="nonsense"):
        online(CPQL, policy_kwargs={"nonsense": 1})
    with pytest.raises(ValueError, match="policy: unknown 'Unknown'; known: MlpPolicy, CnnPolicy, MultiInputPolicy"):
        online(CPQL, policy="Unknown")


# --- test_her, test_n_step_replay, test_vec_normalize


@actor_critics
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_her_online(cls, strategy):
    kwargs = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"goal_selection_strategy": strategy}}
    model = online(cls, GoalEnv(), "MultiInputPolicy", learning_starts=12, **kwargs).learn(30)
    assert model._n_updates >= 15
    assert model.predict(GoalEnv().reset()[0], deterministic=True)[0].shape == (2,)


@actor_critics
def test_vec_normalize_is_applied_once_and_synchronised(cls):
    env, eval_env = (VecNormalize(make_vec_env(box_env), training=training) for training in (True, False))
    model = online(cls, env)
    assert model.get_vec_normalize_env() is env
    model.learn(30, callback=EvalCallback(eval_env, n_eval_episodes=1, eval_freq=10, verbose=0))
    np.testing.assert_allclose(eval_env.obs_rms.mean, env.obs_rms.mean, atol=0.5)
    raw = model.replay_buffer.observations[:30]
    assert np.abs(raw).max() <= 1  # the buffer holds observations as the environment gave them
    batch = next(model.batches(1, 8))
    assert not np.isin(batch.observations[:, 0].numpy(), raw[..., 0]).any()  # and batches normalised ones


# --- test_callbacks, test_logger


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
    assert model._n_updates == 10  # the evaluation stopped it
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


# --- what has no counterpart, and devices


@every
@pytest.mark.parametrize("name", sorted(NOT_OURS))
def test_arguments_without_counterpart_say_what_to_use(cls, name):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(\) got an unexpected argument '{name}': .{{10,}}"):
        cls("MlpPolicy", box_env(), **{name: 1})


@every
def test_evaluate_policy_and_devices(cls, tmp_path):
    model = trained(cls)
    mean, deviation = evaluate_policy(model, make_vec_env(box_env, n_envs=2), n_eval_episodes=3, deterministic=True)
    assert -10 <= mean <= 0 and deviation >= 0
    assert model.device == th.device("cpu") and model.policy.device == th.device("cpu")
    model.policy.to("meta")  # a device that every machine has
    assert model.policy.device == th.device("meta")


@every
def test_environments_as_sb3_takes_them(cls):
    model = cls("MlpPolicy", "Pendulum-v1", **SMALL)
    assert isinstance(model.get_env(), DummyVecEnv) and model.n_envs == 1
    assert cls("MlpPolicy", gym.make("Pendulum-v1"), **SMALL).action_space.shape == (1,)
    with pytest.raises(gym.error.Error):
        cls("MlpPolicy", "NoSuchEnvironment-v0")


def test_progress_bar_and_continuing():
    model = online(ConsistencyAC).learn(20, progress_bar=True)
    model.learn(10, reset_num_timesteps=False, progress_bar=True)
    assert model.num_timesteps == 30
    model.load_dataset(make_arrays())
    model.pretrain(2, progress_bar=True)


def test_the_block_of_coming_from_sac_td3_runs(tmp_path, monkeypatch, capsys):
    import re
    from pathlib import Path

    pytest.importorskip("gymnasium_robotics")
    page = (Path(__file__).parents[1] / "docs" / "coming_from_sac_td3.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    # past the random steps
    shorter = {
        "learning_starts=1000": "learning_starts=310",
        "100_000": "315",
        "10_000": "105",
        "n_eval_episodes=10": "n_eval_episodes=1",
    }
    for long, short in shorter.items():
        assert block.count(long) == 1, long
        block = block.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert "(-" in capsys.readouterr().out
