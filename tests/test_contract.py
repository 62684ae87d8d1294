"""SB3's contract, for every algorithm: predict, save and load, seeds, callbacks, logs, spaces, several environments."""

import subprocess
import sys
import textwrap
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

import sb3_consistency
from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC, DiffusionQL
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.files.zip import ModelFileError
from sb3_consistency.policies.policy import GenerativePolicy
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from tests.conftest import ACTOR_CRITICS, ALGORITHMS, SMALL, VectorEnv, make_arrays

every = pytest.mark.parametrize("cls", ALGORITHMS)
actor_critics = pytest.mark.parametrize("cls", ACTOR_CRITICS)
VARIANTS = [(CPQL, {"value_mode": "iql"}), (DiffusionQL, {"sampling_steps": 2, "sampler": "ddim"})]
MODES = [*((cls, {}) for cls in ALGORITHMS), *VARIANTS]


def box_env(**kwargs):
    return VectorEnv(action_space=spaces.Box(-1, 1, (1,), np.float32), **kwargs)


def make(cls, env=None, policy="MlpPolicy", **kwargs):
    """A model with data loaded and an environment."""
    model = cls(policy, env or box_env(), **{**SMALL, **kwargs})
    model.load_dataset(make_arrays())
    return model


def trained(cls, **kwargs):
    return make(cls, **kwargs).pretrain(5)


def assert_same(a, b):
    """Equal weights, optimizer states and predictions."""
    for name, ours in a.get_parameters().items():
        theirs = b.get_parameters()[name]
        flat = [th.utils._pytree.tree_leaves(x) for x in (ours, theirs)]
        assert len(flat[0]) == len(flat[1])
        for x, y in zip(*flat, strict=True):
            assert th.equal(x, y) if isinstance(x, th.Tensor) else x == y, name
    obs = np.random.default_rng(0).uniform(-1, 1, (4, *a.observation_space.shape)).astype(np.float32)
    np.testing.assert_array_equal(a.predict(obs, deterministic=True)[0], b.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(("cls", "kwargs"), MODES)
def test_save_and_load(cls, kwargs, tmp_path):
    model = trained(cls, **kwargs)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    assert_same(model, loaded)
    assert loaded._n_updates == 5 and loaded.env is None
    loaded = cls.load(tmp_path / "model", env=box_env(), batch_size=7)
    assert loaded.batch_size == 7
    loaded.load_dataset(make_arrays())
    loaded.pretrain(2)


@every
def test_training_continues_identically_after_loading(cls, tmp_path):
    model = trained(cls, curriculum_steps=12)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=box_env())
    loaded.load_dataset(make_arrays())
    for m in (model, loaded):
        m.set_random_seed(1)
        m.pretrain(5)
    assert_same(model, loaded)


@every
def test_same_seed_same_result(cls):
    assert_same(trained(cls), trained(cls))
    different = trained(cls, seed=1)
    with pytest.raises(AssertionError):
        assert_same(trained(cls), different)


@every
def test_policy_alone_is_saved_and_loaded(cls, tmp_path):
    model = trained(cls)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy")
    obs = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


@every
def test_state_dict_is_floating_point_and_restored(cls):
    model = make(cls)
    params = model.get_parameters()
    for key, value in params["policy"].items():
        assert value.is_floating_point(), key
        params["policy"][key] = th.rand_like(value)
    model.set_parameters(params)
    for key, value in model.get_parameters()["policy"].items():
        assert th.equal(value, params["policy"][key]), key
    with pytest.raises(ValueError):
        model.set_parameters({"nothing": {}})


@every
def test_unknown_arguments_are_type_errors(cls, tmp_path):
    with pytest.raises(TypeError, match="etta"):
        make(cls, etta=1)
    with pytest.raises(TypeError, match=r"ent_coef.*no entropy"):
        make(cls, ent_coef=1)
    model = make(cls)
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match="lerning_rate"):
        cls.load(tmp_path / "model", lerning_rate=1)


MISPLACED = [
    (
        CPQL,
        {"policy_kwargs": {"net_archh": [4]}},
        r"policy_kwargs: unknown 'net_archh'; did you mean 'net_arch'\? known: activ",
    ),
    (RACTD, {"policy_kwargs": {"log_std_init": -3}}, r"policy_kwargs: unknown 'log_std_init'; known: "),
    (
        CPQL,
        {"policy_kwargs": {"model_kwargs": {"foo": 1}}},
        r"policy_kwargs\['model_kwargs'\]: unknown 'foo'; known: network_kwargs, .*sampling_share",
    ),
    (
        CPQL,
        {"policy_kwargs": {"model_kwargs": {"network": "ln_resnet"}}},
        r"policy_kwargs\['model_kwargs'\]: network is the policy's: pass policy_kwargs=dict\(network=...\)",
    ),
    (RACTD, {"policy_kwargs": {"model_kwargs": {"network": "unet"}}}, r"\['model_kwargs'\]: network is the policy's"),
    (RACTD, {"policy_kwargs": {"student_kwargs": {"network": "unet"}}}, r"\['student_kwargs'\]: network is the policy's"),
    (RACTD, {"policy_kwargs": {"student_kwargs": {"ctm_gama": 1}}}, r"student_kwargs.*did you mean 'ctm_gamma'\?"),
    (CPQL, {"policy_kwargs": {"n_candidates": 3}}, "policy_kwargs: pass n_candidates to CPQL itself"),
    (CPQL, {"policy_kwargs": {"model_kwargs": {"sampling_steps": 3}}}, "pass sampling_steps to CPQL itself"),
    (RACTD, {"policy_kwargs": {"horizon": 3}}, "policy_kwargs: pass horizon to RACTD itself"),
    (CPQL, {"policy_kwargs": {"networks": {}}}, "policy_kwargs: CPQL sets networks"),
    (CPQL, {"policy_kwargs": {"activation_fn": "relu"}}, "policy_kwargs: activation_fn must be a subclass of torch.nn"),
    (CPQL, {"policy_kwargs": {"activation_fn": th.nn.ReLU()}}, "policy_kwargs: activation_fn must be a subclass of torch.nn"),
    (CPQL, {"policy_kwargs": {"optimizer_class": "adam"}}, "policy_kwargs: optimizer_class must be a subclass"),
    (CPQL, {"policy_kwargs": {"model_kwargs": 3}}, "policy_kwargs: model_kwargs must be a dict"),
    (CPQL, {"policy_kwargs": [1]}, r"policy_kwargs must be a dict or None, got \[1\]"),
    (CPQL, {"action_noise": 0.1}, "action_noise must be an ActionNoise .* or None, got 0.1"),
    (CPQL, {"replay_buffer_class": "her"}, "replay_buffer_class must be a subclass of .*ReplayBuffer"),
    (CPQL, {"replay_buffer_class": lambda *args: None}, "replay_buffer_class must be a subclass of .*ReplayBuffer"),
    (CPQL, {"precision": 16}, r"precision must be one of \('float32', 'bf16'\), got 16"),
    (ConsistencyBC, {"pretrain_steps": 5}, r"pretrain_steps must be 0, got 5: ConsistencyBC learns offline only"),
    (CPQL, {"dataset_kwargs": {"top_frac": 0.1}}, r"dataset_kwargs: unknown 'top_frac'; did you mean 'top_fraction'\?"),
    (CPQL, {"train_freq": "episode"}, r"train_freq must be a number of steps, or \(n, 'step'\)"),
    (CPQL, {"train_freq": (1, "day")}, r"train_freq must be a number of steps, or \(n, 'step'\)"),
    (ConsistencyBC, {"n_candidates": 5}, "unexpected argument 'n_candidates'; it belongs to CPQL, ConsistencyAC, DiffusionQL"),
    (ConsistencyBC, {"plan_of": "states"}, "unexpected argument 'plan_of'; it belongs to RACTD"),
    (CPQL, {"noise_scale": 1.0}, r"it goes into policy_kwargs=dict\(noise_scale=...\)"),
    (CPQL, {"lerning_rate": 1.0}, r"unexpected argument 'lerning_rate'; did you mean 'learning_rate'\?"),
    (CPQL, {"policy": "MLPPolicy"}, r"policy: unknown 'MLPPolicy'; did you mean 'MlpPolicy'\? known: MlpPolicy, CnnPolicy"),
    (CPQL, {"policy": "MultiInputPolicy"}, r"policy: MultiInputPolicy needs Dict observations, got Box.*use MlpPolicy"),
    (CPQL, {"policy": SACPolicy}, "policy: .*SACPolicy.* is none of MlpPolicy, CnnPolicy, MultiInputPolicy"),
]


@pytest.mark.parametrize(("cls", "kwargs", "message"), MISPLACED)
def test_what_is_misspelt_or_misplaced_is_told_where_it_belongs(cls, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**{"policy": "MlpPolicy", "env": box_env(), **SMALL, **kwargs})


def test_policy_kwargs_that_an_own_policy_takes_are_left_to_it():
    class OwnPolicy(GenerativePolicy):
        def __init__(self, *args, **kwargs):
            self.own = kwargs.pop("own")
            super().__init__(*args, **kwargs)

    assert CPQL(OwnPolicy, box_env(), **{**SMALL, "policy_kwargs": {"own": 3}}).policy.own == 3


@every
@pytest.mark.parametrize(("n", "error"), [(10.5, TypeError), ("10", TypeError), (True, TypeError), (-1, ValueError)])
def test_numbers_of_steps_are_whole(cls, n, error):
    model = cls("MlpPolicy", box_env(), dataset="no/such-v0", **SMALL)
    with pytest.raises(error, match="total_timesteps must be"):
        model.learn(n)
    with pytest.raises(error, match="gradient_steps must be"):
        model.pretrain(n)
    model.dataset = None
    model.load_dataset(make_arrays())
    assert model.pretrain(np.float64(1e0))._n_updates == 1 and type(model.run.call[1]["gradient_steps"]) is int
    model.learn(2e0)
    assert model.num_timesteps == 2


def test_data_that_could_not_be_loaded_is_missed_again():
    model = CPQL("MlpPolicy", box_env(), dataset="no/such-v0", **SMALL)
    for _ in range(2):
        with pytest.raises(DatasetError, match="no/such-v0"):
            model.learn(2)
    assert model.num_timesteps == 0


@every
def test_flags_are_true_or_false(cls):
    with pytest.raises(TypeError, match="keep_offline must be True or False, got 'no'"):
        make(cls, keep_offline="no")
    with pytest.raises(TypeError, match="cosine_lr_decay must be True, False or None, got 'no'"):
        make(cls, cosine_lr_decay="no")
    with pytest.raises(TypeError, match="compile must be True or False, got None"):
        make(cls, compile=None)


@every
@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-np.inf, 1, (2,)), spaces.MultiBinary(2)])
def test_unsupported_action_spaces(cls, space):
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="env:"):
            cls("MlpPolicy", VectorEnv(action_space=space))


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


@every
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

    middle, near, sample = (actions(scale) for scale in (0.0, near_scale, 1.0))
    assert 0 < np.abs(near - middle).mean() < np.abs(sample - middle).mean()
    with pytest.raises(ValueError, match="noise_scale"):
        actions(-0.1)


@actor_critics
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


@pytest.fixture(scope="module")
def cpql_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cpql.zip"
    CPQL("MlpPolicy", box_env(), **SMALL).save(path)
    return path


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_candidates": 0},
        {"candidate_selection": "x"},
        {"candidate_temperature": 0},
        {"actor_q": "x"},
        {"target_policy": "x"},
        {"value_mode": "x"},
        {"value_critic": "x"},
        {"expectile": 1.0},
        {"alpha": -1},
        {"bc_loss": "x"},
        {"metric": "x"},
        {"sampling_steps": 0},
        {"train_sampling_steps": 0},
        {"consistency_ema_decay": 2},
        {"actor_ema_decay": -1},
        {"max_grad_norm": 0},
        {"offline_fraction": 1.5},
        {"pretrain_steps": -1},
        {"batch_size": -3},
        {"precision": "bf17"},
        {"on_divergence": "Stop"},
        {"compile": "no"},
        {"learning_rate": "x"},
        {"stats_window_size": 0},
    ],
)
def test_bad_hyperparameters_name_themselves(kwargs, cpql_file):
    name = next(iter(kwargs))
    with pytest.raises((ValueError, TypeError), match=name):
        CPQL("MlpPolicy", box_env(), **{**SMALL, **kwargs})
    with pytest.raises(ValueError, match=rf"load\(\): the argument {name}=.*does not fit .*cpql.zip: {name}"):
        CPQL.load(cpql_file, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"value_mode": "iql"}, "value_mode='iql' does not fit .*networks would not be those"),
        ({"target_policy": "current", "seed": 1}, "arguments target_policy='current', seed=1 do not fit"),
        ({"device": "gpu"}, "device='gpu' does not fit"),
    ],
)
def test_what_does_not_fit_a_sound_file_is_not_called_damage(kwargs, message, cpql_file):
    with pytest.raises(ValueError, match=message) as refused:
        CPQL.load(cpql_file, **kwargs)
    assert not isinstance(refused.value, ModelFileError)


def test_load_takes_the_id_of_an_environment(tmp_path):
    CPQL("MlpPolicy", "Pendulum-v1", **SMALL).save(tmp_path / "model")
    assert CPQL.load(tmp_path / "model", env="Pendulum-v1").env.num_envs == 1
    with pytest.raises(gym.error.NameNotFound):
        CPQL.load(tmp_path / "model", env="Pendulums-v1")


@pytest.mark.parametrize(("cls", "theirs"), [(SAC, "stable_baselines3.sac.policies.SACPolicy"), (PPO, "ActorCriticPolicy")])
def test_a_model_of_another_algorithm_is_told_as_such(cls, theirs, tmp_path):
    cls("MlpPolicy", box_env(), policy_kwargs={"net_arch": [4]}, device="cpu").save(tmp_path / "model")
    with pytest.raises(ModelFileError, match=f"model: This is a model of another algorithm, with .*{theirs}: load it with"):
        CPQL.load(tmp_path / "model", batch_size=3)
    path = tmp_path / "nowhere.zip"
    with pytest.raises(FileNotFoundError, match=f"^{path}: there is no such file"):
        CPQL.load(path)


CONSISTENCY_OPTIONS = [
    {"bc_loss": "consistency"},
    {"bc_loss": "consistency", "consistency_ema_decay": 0.99, "loss_scaling": True},
    {"bc_loss": "consistency", "metric": "pseudo_huber"},
    {"bc_loss": "ict", "curriculum": (4, 8)},
    {"bc_loss": "reconstruction"},
    {"bc_loss": "reconstruction", "policy_kwargs": {"model_kwargs": {"sampling_share": 0.0}}},
    {"policy_kwargs": {"model_kwargs": {"sigma_max": 20.0}, "embedding_scale": 250.0}},
]
DIFFUSION_OPTIONS = [{"diffusion_steps": 1}, {"beta_schedule": "cosine"}, {"sampler": "ddim"}, {"sampling_steps": 2}]
SHARED_OPTIONS = [
    {"sampling_steps": 3, "train_sampling_steps": 2},
    {"eta": lambda step: 1.0 / (1 + step)},
    {"alpha": lambda step: float(step < 2)},
    {"max_q_backup": True},
    {"q_norm": True},
    {"actor_q": "min", "normalize_actor_q": False},
    {"actor_q": "mean"},
    {"target_policy": "current"},
    {"actor_ema_interval": 5, "actor_ema_start": 3},
    {"actor_learning_rate": 1e-5, "cosine_lr_decay": True, "max_grad_norm": 1.0},
    {"policy_kwargs": {"n_critics": 4, "layer_norm": True, "net_arch": [16, 16]}},
    {"policy_kwargs": {"n_critics": 1}},
    {"policy_kwargs": {"network": "ln_resnet", "net_arch": [16, 16]}},
    {"policy_kwargs": {"net_arch": {"pi": [8], "qf": [16]}, "share_features_extractor": True}},
    {"policy_kwargs": {"net_arch": []}},
    {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": None, "activation_fn": th.nn.ReLU}},
    {"n_steps": 3},
    {"tau": 0.1, "target_update_interval": 3},
]


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        *((cls, kwargs) for cls in ACTOR_CRITICS for kwargs in SHARED_OPTIONS),
        *((cls, kwargs) for cls in (ConsistencyAC, CPQL) for kwargs in CONSISTENCY_OPTIONS),
        *((DiffusionQL, kwargs) for kwargs in DIFFUSION_OPTIONS),
    ],
)
def test_every_option_trains_and_survives_saving(cls, kwargs, tmp_path):
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
    model = trained(cls, **kwargs)
    assert kwargs == given  # the caller's arguments stay as they are
    model.save(tmp_path / "model")
    assert_same(model, cls.load(tmp_path / "model"))
    assert all(th.isfinite(p).all() for p in model.policy.parameters())


def test_cpiql_value_of_target_or_current_critic():
    for value_critic in ("target", "current"):
        model = trained(CPQL, value_mode="iql", value_critic=value_critic, expectile=0.9)
        assert list(model.losses()) == ["value", "critic", "actor"]


@actor_critics
def test_actor_loss_leaves_the_critic_alone(cls):
    model = trained(cls)
    batch = next(model.batches(1, 16))
    model.critic.optimizer.zero_grad(set_to_none=True)
    model.actor.optimizer.zero_grad(set_to_none=True)
    model.prepare_step()
    model.updater.step({"actor": model.actor_loss}, {}, batch, 1)
    assert all(p.grad is None for p in model.critic.parameters())
    assert any(p.grad is not None for p in model.actor.parameters())


@actor_critics
def test_targets_move_by_polyak_weights(cls):
    model = make(cls, tau=0.25, target_update_interval=2, actor_ema_decay=0.9, actor_ema_start=0)
    before = [p.clone() for p in model.critic_target.parameters()]
    model.pretrain(1)
    assert all(th.equal(p, q) for p, q in zip(before, model.critic_target.parameters(), strict=True))
    actor_before = [p.clone() for p in model.actor_target.parameters()]
    model.pretrain(1)
    for old, new, source in zip(before, model.critic_target.parameters(), model.critic.parameters(), strict=True):
        assert th.allclose(new, 0.75 * old + 0.25 * source, atol=1e-6)
    for old, new, source in zip(actor_before, model.actor_target.parameters(), model.actor.parameters(), strict=True):
        assert th.allclose(new, 0.9 * old + 0.1 * source, atol=1e-6)


@actor_critics
@pytest.mark.parametrize("kwargs", [{}, {"train_freq": (1, "episode"), "gradient_steps": -1}, {"learning_starts": 15}])
def test_online_from_scratch(cls, kwargs):
    model = cls(
        "MlpPolicy", "Pendulum-v1", action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)), **{**SMALL, **kwargs}
    )
    model.learn(210)
    assert model.num_timesteps >= 210 and model._n_updates > 0
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= 230


@actor_critics
def test_several_environments_vec_normalize_and_n_steps(cls, tmp_path):
    env = VecNormalize(make_vec_env(box_env, n_envs=2))
    model = cls("MlpPolicy", env, n_steps=3, learning_starts=10, **SMALL)
    model.load_dataset(make_arrays())
    model.pretrain(3)
    model.learn(40)
    model.save(tmp_path / "model")
    env.save(tmp_path / "vec_normalize.pkl")
    fresh = VecNormalize.load(tmp_path / "vec_normalize.pkl", make_vec_env(box_env, n_envs=2))
    cls.load(tmp_path / "model", env=fresh).learn(20)


@every
def test_image_and_dict_observations(cls):
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    mixed = spaces.Dict({"image": image, "vector": spaces.Box(-1, 1, (4,)), "kind": spaces.Discrete(3)})
    for policy, space in (("CnnPolicy", image), ("MultiInputPolicy", mixed)):
        env = VectorEnv(observation_space=space)
        collector = CPQL(policy, env, buffer_size=60, learning_starts=100, **SMALL).learn(30)
        model = cls(policy, env, buffer_size=60, **SMALL)
        model.load_dataset(collector.replay_buffer)
        model.pretrain(2)
        obs = space.sample()
        assert model.predict(obs, deterministic=True)[0].shape == (2,)


def from_arrays_alone(observations=None, actions=1.0, cls=CPQL, policy="MlpPolicy"):
    data = make_arrays()
    data["actions"] = actions * data["actions"]
    if observations is not None:
        data.update({key: observations(data[key]) for key in ("observations", "next_observations")})
    return cls(policy, None, dataset=data, **SMALL).pretrain(3)


DOUBLES = spaces.Box(-1000, 1000, (3,), np.float64)  # arrays don't tell these bounds, nor this precision
DICT_OF_DOUBLES = spaces.Dict({"a": DOUBLES, "b": DOUBLES})


@pytest.mark.parametrize("way", ["set_env", "load", "load_safe"])
@pytest.mark.parametrize("space", [DOUBLES, DICT_OF_DOUBLES])
def test_a_model_made_from_arrays_takes_the_spaces_of_an_environment(way, space, tmp_path):
    is_dict = isinstance(space, spaces.Dict)
    model = from_arrays_alone(
        (lambda x: {"a": x, "b": x}) if is_dict else None, policy="MultiInputPolicy" if is_dict else "MlpPolicy"
    )
    env = VectorEnv(space, spaces.Box(-1, 1, (1,), np.float64))
    observation = space.sample()
    expected = model.predict(observation, deterministic=True)[0]
    if way == "set_env":
        model.set_env(env)
    else:
        getattr(model, way.replace("load", "save"))(tmp_path / "model")
        model = getattr(type(model), way)(tmp_path / "model", env=env)
    assert model.observation_space == model.actor.observation_space == space and model.action_space == env.action_space
    np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], expected)
    model.learn(12)
    assert model.replay_buffer.observation_space == space
    model.save(tmp_path / "again")
    CPQL.load(tmp_path / "again", env=env)
    with pytest.raises(ValueError, match="spaces do not match"):  # they are stated now
        model.set_env(box_env())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (VectorEnv(spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (1,))), r"'observation_space' \(an \.npz file"),
        (VectorEnv(spaces.MultiBinary(3), spaces.Box(-1, 1, (1,))), "inferred from arrays"),
        (VectorEnv(DOUBLES, spaces.Box(-2, 2, (1,))), "another scale: make the model with env=.*'action_space'"),
        (VectorEnv(DOUBLES, spaces.Discrete(2)), "another scale"),
    ],
)
def test_spaces_that_would_change_what_was_learned_are_refused(env, message, tmp_path):
    model = from_arrays_alone(actions=0.5)
    before = model.observation_space, model.action_space
    model.save(tmp_path / "model")
    for attempt in (model.set_env, lambda env: CPQL.load(tmp_path / "model", env=env)):
        with pytest.raises(ValueError, match=message):
            attempt(env)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(lambda: VectorEnv(DOUBLES, spaces.Box(-1, 1, (1,))), n_envs=2))
    assert (model.observation_space, model.action_space) == before and model.actor.observation_space is before[0]


class Counter(BaseCallback):
    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at
        self.steps = []
        self.started = self.ended = 0

    def _on_training_start(self):
        self.started += 1

    def _on_step(self):
        self.steps.append(self.model.num_timesteps)
        return self.stop_at is None or len(self.steps) < self.stop_at

    def _on_training_end(self):
        self.ended += 1


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
    assert model.num_timesteps == 0 and model._n_updates == 10
    stopper = Counter(stop_at=3)
    model.pretrain(10, callback=stopper)
    assert len(stopper.steps) == 3 and stopper.steps[0] == 11 and model._n_updates == 13


@actor_critics
def test_learn_pretrains_once_then_goes_online(cls, tmp_path):
    counter = Counter()
    model = cls("MlpPolicy", box_env(), dataset=make_arrays(), pretrain_steps=7, learning_starts=1000, **SMALL)
    model.learn(12, callback=counter)
    assert counter.steps == [*range(1, 8), *range(1, 13)]
    assert model.offline_buffer.size() == 120 and model.replay_buffer.size() == 12
    assert model._n_updates == 7 + 12  # no random warm-up after an offline phase
    model.learn(5)
    assert model._n_updates == 7 + 12 + 5
    model.save(tmp_path / "model")
    # the arrays are not saved with the model: experience gathers first, by the policy
    loaded = cls.load(tmp_path / "model", env=box_env(), learning_starts=3)
    loaded.learn(5)
    assert loaded._n_updates == 24 + 3 and loaded.learning_starts == 0


def test_stopping_the_pretraining_stops_learn():
    model = CPQL("MlpPolicy", box_env(), dataset=make_arrays(), pretrain_steps=7, **SMALL)
    model.learn(12, callback=Counter(stop_at=3))
    assert model._n_updates == 3 and model.num_timesteps == 0


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.25, 8), (1.0, 32), (0.0, 0), (lambda progress: progress, 16), (None, None)]
)
def test_offline_fraction(fraction, expected):
    model = make(CPQL, offline_fraction=fraction)
    model.pretrain(1)
    model.learn(120)
    model._current_progress_remaining = 0.5
    offline_ids = set(make_arrays()["observations"][:, 0].tolist())
    counts = []
    for batch in model.batches(200, 32):
        counts.append(sum(x in offline_ids for x in batch.observations[:, 0].tolist()))
    if expected is None:
        assert np.mean(counts) == pytest.approx(16, abs=3)  # 120 offline, 120 online transitions
    else:
        assert set(counts) == {expected}


def test_one_buffer_if_offline_data_need_not_be_kept():
    model = make(CPQL, keep_offline=False, buffer_size=130)
    model.pretrain(1)
    buffer = model.replay_buffer
    model.learn(20)
    assert model.offline_buffer is None and model.replay_buffer is buffer and buffer.full and buffer.pos == 10


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
    assert model._n_updates == 0
    model.learn(0)
    assert model._n_updates == 3
    model.set_env(box_env())
    model.learn(10)
    assert model.num_timesteps == 10 and model._n_updates == 13


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


def test_user_logger_is_kept(tmp_path):
    model = make(CPQL)
    logger = configure(str(tmp_path), ["csv", "json", "log"])
    model.set_logger(logger)
    model.pretrain(2, log_interval=1)
    assert model.logger is logger and (tmp_path / "progress.csv").read_text().count("\n") == 3
    assert not any(isinstance(f, HumanOutputFormat) and f.file is sys.stdout for f in logger.output_formats)


def test_bigger_batches_and_chunks_see_every_row():
    model = make(ConsistencyBC)
    seen = {x for batch in model.batches(130, 32) for x in batch.observations[:, 0].tolist()}
    assert len(seen) == 120


def test_loaded_in_a_new_process_it_goes_online(tmp_path):
    model = CPQL("MlpPolicy", "Pendulum-v1", **SMALL)
    model.learn(120)
    model.save(tmp_path / "model")
    code = f"""
        import gymnasium as gym
        from sb3_consistency import CPQL
        model = CPQL.load({str(tmp_path / "model")!r}, env=gym.make("Pendulum-v1"))
        model.learn(20, reset_num_timesteps=False)
        print(model.num_timesteps)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "140"


def test_default_arguments_follow_sac():
    import inspect

    from stable_baselines3 import SAC

    ours = inspect.signature(GenerativeAlgorithm.__init__).parameters
    for name, parameter in inspect.signature(SAC.__init__).parameters.items():
        if name in ours and name not in ("policy", "env", "self"):
            assert ours[name].default == parameter.default, name


def test_lazy_attributes():
    assert set(dir(sb3_consistency)) == set(sb3_consistency.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        sb3_consistency.nothing  # noqa: B018


def test_evaluate_policy():
    mean, _ = evaluate_policy(trained(CPQL), make_vec_env(box_env, n_envs=2), n_eval_episodes=3)
    assert -10 <= mean <= 0


@actor_critics
def test_layer_norm_is_on_by_default_and_can_be_switched_off(cls):
    def norms(model):
        return [m for m in model.critic.modules() if type(m).__name__ == "StackedLayerNorm"]

    assert len(norms(make(cls))) == 2
    assert not norms(make(cls, policy_kwargs={"layer_norm": False}))


def test_a_loaded_online_buffer_does_not_replace_the_offline_data(tmp_path):
    model = make(CPQL)
    model.pretrain(1)
    model.learn(12)
    model.save_replay_buffer(tmp_path / "online.pkl")
    resumed = make(CPQL)
    resumed.load_replay_buffer(tmp_path / "online.pkl")
    assert resumed.offline_buffer.size() == 120 and resumed.replay_buffer.size() == 12
    resumed.learn(5)
    assert resumed.replay_buffer.size() == 17


def test_a_saved_buffer_of_offline_data_is_offline_data_again(tmp_path):
    model = CPQL("MlpPolicy", box_env(), buffer_size=500, **SMALL)
    model.load_dataset([make_arrays(), make_arrays(n_episodes=2, seed=1)], weights=[1, 3])
    model.pretrain(2).save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "data.pkl")
    assert not hasattr(model.replay_buffer, "offline_segments")
    loaded = CPQL.load(tmp_path / "model", env=box_env())
    loaded.load_replay_buffer(tmp_path / "data.pkl")
    assert loaded.data.buffer is loaded.replay_buffer and loaded.data.segments == model.data.segments
    loaded.learn(5)
    assert loaded.offline_buffer.size() == 160
    assert (loaded.replay_buffer.size(), loaded.replay_buffer.buffer_size) == (5, 500)
    loaded.save_replay_buffer(tmp_path / "online.pkl")
    loaded.load_replay_buffer(tmp_path / "online.pkl")
    assert loaded.offline_buffer.size() == 160 and loaded.replay_buffer.size() == 5
    loaded.replay_buffer = None
    with pytest.raises(AssertionError, match="replay buffer is not defined"):  # SB3's
        loaded.save_replay_buffer(tmp_path / "none.pkl")


def test_only_images_are_taken_for_images():
    data = make_arrays(n_episodes=2, length=10, action_dim=2)
    for key in ("observations", "next_observations"):
        data[key] = np.zeros((20, 2, 3, 4), np.float32)
    env = VectorEnv(observation_space=spaces.Box(-1, 1, (2, 3, 4), np.float32))
    assert CPQL.from_dataset(data, env=env, **SMALL).pretrain(1).predict(np.zeros((2, 3, 4)))[0].shape == (2,)


def test_from_dataset_takes_an_environment_or_its_id():
    data = {**make_arrays(action_dim=1), "action_space": None}
    model = CPQL.from_dataset(data, env="Pendulum-v1", **SMALL)
    assert model.replay_buffer.size() == 120 and model.env.num_envs == 1


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
    assert resumed._n_updates == 20 + 3 and resumed.num_timesteps == 3


def test_evaluation_of_a_model_without_environment():
    callback = EvalCallback(make_vec_env(box_env), n_eval_episodes=1, eval_freq=5, verbose=0)
    data = {**make_arrays(), "observation_space": box_env().observation_space}
    model = ConsistencyBC("MlpPolicy", dataset=data, **SMALL).learn(10, callback=callback)
    assert np.isfinite(callback.last_mean_reward) and model.get_env() is None


def test_one_buffer_stays_one_when_learning_continues():
    model = CPQL("MlpPolicy", box_env(), dataset=make_arrays(), keep_offline=False, **SMALL)
    model.learn(10)
    model.learn(10)
    assert model.offline_buffer is None and model.replay_buffer.size() == 140


def test_curriculum_steps_count_online_too():
    model = ConsistencyAC("MlpPolicy", box_env(), curriculum_steps=40, learning_starts=10, **SMALL).learn(30)
    assert model.progress.item() == pytest.approx(19 / 40)


def test_n_step_models_load_quietly_with_another_n(tmp_path):
    kwargs = {"handle_timeout_termination": True}
    model = make(CPQL, n_steps=3, replay_buffer_kwargs=kwargs)
    assert kwargs == {"handle_timeout_termination": True}
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CPQL.load(tmp_path / "model", env=box_env()).replay_buffer.n_steps == 3
        assert type(CPQL.load(tmp_path / "model", env=box_env(), n_steps=1).replay_buffer) is ReplayBuffer


def test_network_arguments_join_the_architecture():
    kwargs = {"net_arch": [16, 16], "network": "ln_resnet", "model_kwargs": {"network_kwargs": {"dropout": 0.0}}}
    layers = make(CPQL, policy_kwargs=kwargs).actor.model.network.layers
    assert layers[0].out_features == 16 and layers[2].layers[0].p == 0.0


def test_schedules_are_clipped_to_shares():
    model = make(CPQL, offline_fraction=lambda progress: 1.5)
    model.pretrain(1)
    model.learn(3)
    assert len(next(model.batches(1, 8)).rewards) == 8


def test_flat_action_dimensions_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(np.zeros(2, np.float32), np.array([1, 0], np.float32))))


def test_continued_offline_learning_continues_the_decay():
    model = ConsistencyBC("MlpPolicy", dataset=make_arrays(), **SMALL).learn(64)
    model.learn(64, reset_num_timesteps=False)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 3e-3)
