"""Saving and loading: nothing is lost, training goes on, and what does not fit is told."""

import inspect
import io
import pickle
import subprocess
import sys
import textwrap
import warnings
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from sb3_consistency import CPQL, ConsistencyAC, DiffusionQL
from sb3_consistency.files.zip import ModelFileError
from sb3_consistency.options import options_of
from tests.conftest import (
    ACTOR_CRITICS,
    MODES,
    SMALL,
    VectorEnv,
    assert_same,
    box_env,
    every,
    make,
    make_arrays,
    online,
    trained,
    weights,
)


@pytest.mark.parametrize(("cls", "kwargs"), MODES)
def test_save_and_load(cls, kwargs, tmp_path):
    model = trained(cls, **kwargs)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    assert_same(model, loaded)
    assert loaded.n_updates == 5 and loaded.env is None
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
    {"policy_kwargs": {"n_quantiles": 5}, "top_quantiles_to_drop_per_net": 1},
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
        *((cls, kwargs) for cls in ACTOR_CRITICS for kwargs in SHARED_OPTIONS if kwargs.keys() <= options_of(cls).keys()),
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


def test_load_has_sb3s_arguments_and_no_policy(tmp_path):
    theirs = list(inspect.signature(SAC.load).parameters)
    assert list(inspect.signature(CPQL.load).parameters) == theirs
    trained(CPQL).save(tmp_path / "model")
    assert CPQL.load(tmp_path / "model", box_env(), "cpu").device.type == "cpu"
    with pytest.raises(TypeError, match="policy"):
        CPQL.load(tmp_path / "model", policy="MlpPolicy")


@pytest.mark.parametrize("sac_first", [True, False])
def test_policy_kwargs_may_be_sacs_too(sac_first, tmp_path):
    """SAC adds to the dict that it is given."""
    kwargs = {"net_arch": [8]}
    make_ours = lambda: make(CPQL, policy_kwargs=kwargs)  # noqa: E731
    model = None if sac_first else make_ours()
    SAC("MlpPolicy", box_env(), policy_kwargs=kwargs, buffer_size=10)
    model = model or make_ours()
    kwargs["net_arch"].append(4)
    model.save(tmp_path / "model")
    assert_same(model, CPQL.load(tmp_path / "model"))


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


def test_n_step_models_load_quietly_with_another_n(tmp_path):
    kwargs = {"handle_timeout_termination": True}
    model = make(CPQL, n_steps=3, replay_buffer_kwargs=kwargs)
    assert kwargs == {"handle_timeout_termination": True}
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CPQL.load(tmp_path / "model", env=box_env()).replay_buffer.n_steps == 3
        assert type(CPQL.load(tmp_path / "model", env=box_env(), n_steps=1).replay_buffer) is ReplayBuffer
        # and from one step to several, again and again
        for n_steps in (1, 3, None):
            model = CPQL.load(tmp_path / "model", env=box_env(), n_steps=n_steps)
            assert model.n_steps == getattr(model.replay_buffer, "n_steps", 1) == (n_steps or 3)
            model.save(tmp_path / "model")
        assert CPQL.load(tmp_path / "model", learning_rate=None).learning_rate == 1e-3


def test_a_buffer_of_the_models_own_has_the_models_discount(tmp_path):
    model = online(CPQL, learning_starts=100).learn(10)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.save(tmp_path / "model")
    model.gamma = 0.5
    other = CPQL.load(tmp_path / "model", env=box_env(), gamma=0.5)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    for each in (model, other):
        # of the newest rows fewer steps are known
        assert next(each.batches(1, 64)).discounts.unique().tolist() == [0.125, 0.25, 0.5]
    kwargs = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 0.9}}
    own = online(CPQL, learning_starts=100, **kwargs).learn(10)
    own.gamma = 0.5
    assert next(own.batches(1, 64)).discounts.unique().tolist() == pytest.approx([0.81, 0.9])


class Renamed(CPQL):
    pass


def test_files_of_subclasses_load_in_their_base(tmp_path):
    model = make(Renamed).pretrain(1)
    model.save(tmp_path / "model")
    assert_same(model, CPQL.load(tmp_path / "model"))
    with pytest.raises(ValueError, match="This is a CPQL"):
        ConsistencyAC.load(tmp_path / "model")


# the policy, some parameters, copies


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
def test_some_parameters_alone(cls):
    model, other = trained(cls), trained(cls, seed=1)
    policy = other.get_parameters()["policy"]
    name = next(iter(policy))
    with pytest.raises(RuntimeError):
        model.set_parameters({"policy": {name: policy[name]}})
    model.set_parameters({"policy": {name: policy[name]}}, exact_match=False)
    assert th.equal(model.policy.state_dict()[name], policy[name])


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
