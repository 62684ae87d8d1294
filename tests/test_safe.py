"""save_safe and load_safe: the same model back, and nothing executed, whatever the file holds."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import save_file
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecNormalize

import sb3_consistency
from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC, DiffusionQL, FrameReplayBuffer
from sb3_consistency.files.safe import SafeLoadError, _digest, load_safe
from sb3_consistency.policies.policy import MlpPolicy
from tests.conftest import ALGORITHMS, MODES, SMALL, VectorEnv, assert_same, box_env, make, make_arrays, trained
from tests.test_frames import assert_same_batches
from tests.test_loading import GoalEnv, dict_arrays

ARGUMENTS = [
    (ConsistencyBC, {"bc_loss": "consistency", "consistency_ema_decay": 0.9, "curriculum": (4, 8), "dataset": "mine-v0"}),
    (ConsistencyAC, {"policy_kwargs": {"net_arch": {"pi": [8], "qf": [16]}, "share_features_extractor": True}}),
    (
        CPQL,
        {
            "policy_kwargs": {
                "net_arch": [8],
                "optimizer_class": th.optim.AdamW,
                "optimizer_kwargs": {"betas": (0.8, 0.9)},
                "activation_fn": th.nn.Tanh,
            },
        },
    ),
    (CPQL, {"policy_kwargs": {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}}),
    (CPQL, {"n_steps": 3, "train_freq": (2, "step"), "n_eval_candidates": 5, "policy_kwargs": {"network": "ln_resnet"}}),
    (DiffusionQL, {"target_policy": "current", "replay_buffer_kwargs": {"handle_timeout_termination": True}}),
    (RACTD, {"horizon": 8, "history": 2, "executed_steps": 3, "tracking_gains": (1.0, 2.0)}),
]


@pytest.mark.parametrize(("cls", "kwargs"), [*MODES, *ARGUMENTS])
def test_the_same_model_comes_back_and_training_goes_on(cls, kwargs, tmp_path):
    model = make(cls, curriculum_steps=12, **kwargs).pretrain(5)
    path = model.save_safe(tmp_path / "model")
    assert path.name == "model.safetensors" and os.listdir(tmp_path) == ["model.safetensors"]
    loaded = cls.load_safe(tmp_path / "model", env=box_env())
    assert type(loaded) is cls and loaded.policy_kwargs == model.policy_kwargs and loaded.train_freq == model.train_freq
    assert type(loaded.replay_buffer) is type(model.replay_buffer)
    if model.can_act:
        assert_same(model, loaded)
    model.dataset = None
    for m in (model, loaded):
        m.load_dataset(make_arrays())
        m.set_random_seed(1)
        m.pretrain(8)
    assert_same(model, loaded)
    assert model.n_updates == loaded.n_updates == 13


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_a_planner_in_any_stage(steps, tmp_path):
    model = make(RACTD, curriculum_steps=10).pretrain(steps)
    loaded = sb3_consistency.load_safe(model.save_safe(tmp_path / "model"))
    assert (loaded.stage, loaded.run.student_started) == (model.stage, model.run.student_started)
    obs = np.zeros((2, 3), np.float32)
    plans = [m.teacher_plan(obs, steps=3, deterministic=True) for m in (model, loaded)]
    np.testing.assert_array_equal(*plans)
    for m in (model, loaded):
        m.load_dataset(make_arrays())
        m.set_random_seed(1)
        m.pretrain(10 - steps)
    assert_same(model, loaded)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_images_and_dicts(cls, tmp_path):
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    vector = spaces.Box(np.array([-1, -np.inf, 0, -5.0]), np.array([1, np.inf, np.inf, 5.0]), dtype=np.float64)
    # not in the order of the alphabet: extractors concatenate in the space's
    entries = [("vector", vector), ("image", image), ("kind", spaces.Discrete(3)), ("flags", spaces.MultiBinary(2))]
    mixed = spaces.Dict(entries)
    for policy, space in (("CnnPolicy", image), ("MultiInputPolicy", mixed)):
        env = VectorEnv(observation_space=space)
        data = CPQL(policy, env, buffer_size=40, **SMALL).learn(30).replay_buffer
        model = cls(policy, env, buffer_size=40, **SMALL)
        model.load_dataset(data)
        model.pretrain(10)
        loaded = sb3_consistency.load_safe(model.save_safe(tmp_path / policy))
        assert loaded.observation_space == model.observation_space and loaded.env is None
        if space is mixed:
            assert list(loaded.observation_space.spaces) == [name for name, _ in entries]
        obs = model.observation_space.sample()
        actions = [m.predict(obs, deterministic=True)[0] for m in (model, loaded)]
        np.testing.assert_array_equal(*actions)
        assert (tmp_path / policy).with_suffix(".safetensors").stat().st_size > 10_000


def test_her_and_rewards(tmp_path):
    kwargs = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    model = CPQL("MultiInputPolicy", GoalEnv(), **kwargs, **SMALL)
    model.load_dataset(dict_arrays())
    path = model.pretrain(2).save_safe(tmp_path / "her")
    loaded = load_safe(path, env=GoalEnv())
    assert loaded.replay_buffer.n_sampled_goal == 2
    loaded.learn(15, reset_num_timesteps=False)
    with pytest.raises(ValueError, match=r"env is None: .*HerReplayBuffer asks the environment"):
        load_safe(path)
    model = make(CPQL)
    model.load_dataset(make_arrays(), reward_transform="normalize")
    assert load_safe(model.save_safe(tmp_path / "model")).run.reward_function == model.run.reward_function


def test_paths_do_not_travel(tmp_path):
    np.savez(tmp_path / "data.npz", **make_arrays())
    model = CPQL("MlpPolicy", box_env(), dataset=str(tmp_path / "data.npz"), tensorboard_log=str(tmp_path / "tb"), **SMALL)
    loaded = load_safe(model.save_safe(tmp_path / "model"))
    assert loaded.dataset is None and loaded.tensorboard_log is None
    assert str(tmp_path).encode() not in (tmp_path / "model.safetensors").read_bytes()
    teacher = make(RACTD, curriculum_steps=10).pretrain(4)
    teacher.save(tmp_path / "teacher")
    student = make(RACTD, teacher=str(tmp_path / "teacher"), curriculum_steps=10)
    student.save_safe(tmp_path / "student")
    assert load_safe(tmp_path / "student").stage_ends() == student.stage_ends() == (0, 1)


def test_a_buffer_of_frames_comes_without_its_folder(tmp_path):
    kwargs = {"n_stack": 2, "random_shift": 1, "folder": str(tmp_path / "here")}
    space = spaces.Box(0, 255, (2, 36, 36), np.uint8)
    model = CPQL("CnnPolicy", VectorEnv(space), replay_buffer_class=FrameReplayBuffer, replay_buffer_kwargs=kwargs, **SMALL)
    path = model.learn(15).save_safe(tmp_path / "model")
    loaded = load_safe(path, env=VectorEnv(space))
    assert type(loaded.replay_buffer) is FrameReplayBuffer and loaded.replay_buffer.folder is None
    assert loaded.replay_buffer_kwargs == {"n_stack": 2, "random_shift": 1} and model.replay_buffer_kwargs == kwargs
    assert str(tmp_path).encode() not in path.read_bytes()
    model.save_replay_buffer(tmp_path / "buffer.safetensors")
    loaded.load_replay_buffer(tmp_path / "buffer.safetensors")
    assert_same_batches(loaded.replay_buffer, model.replay_buffer)
    loaded.learn(6, reset_num_timesteps=False)


def test_environments(tmp_path):
    path = trained(CPQL).save_safe(tmp_path / "model")
    env = VecNormalize(make_vec_env(box_env, n_envs=2))
    loaded = CPQL.load_safe(path, env=env, device="cpu")
    assert loaded.n_envs == 2 and loaded.get_vec_normalize_env() is env
    loaded.learn(120, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="spaces do not match"):
        load_safe(path, env=VectorEnv())


class OwnExtractor(BaseFeaturesExtractor):
    def __init__(self, space):
        super().__init__(space, 3)

    def forward(self, x):
        return x


class OwnPolicy(MlpPolicy):
    pass


class OwnAlgorithm(CPQL):
    pass


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("learning_rate", {"learning_rate": lambda progress: 1e-3 * progress}),
        ("eta", {"eta": lambda step: 1.0}),
        ("offline_fraction", {"offline_fraction": lambda progress: 0.5}),
        ("action_noise", {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}),
        ("policy_kwargs.*features_extractor_class", {"policy_kwargs": {"features_extractor_class": OwnExtractor}}),
        ("policy_kwargs.*betas", {"policy_kwargs": {"optimizer_kwargs": {"betas": np.ones(2) / 2}}}),
    ],
)
def test_what_is_not_plain_data_is_named(name, kwargs, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s)^{name}.*before save_safe"):
        CPQL("MlpPolicy", box_env(), **{**SMALL, **kwargs}).save_safe(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_learning_rates_of_the_zoo_are_numbers(tmp_path):
    model = CPQL("MlpPolicy", box_env(), **SMALL)
    model.learning_rate = ConstantSchedule(2e-4)  # rl-zoo3 wraps what its files say
    assert load_safe(model.save_safe(tmp_path / "model")).learning_rate == 2e-4


@pytest.mark.parametrize("kwargs", [{"buffer_size": 20_000_000}, {"target_update_interval": 10**7}, {"eta": 2e6}])
def test_what_would_not_be_read_is_not_written(kwargs, tmp_path):
    model = CPQL("MlpPolicy", box_env(), **SMALL)
    vars(model).update(kwargs)
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}=.* is too large"):
        model.save_safe(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_own_classes_and_diverged_models_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"policy: OwnPolicy.*save\(\)"):
        CPQL(OwnPolicy, box_env(), **SMALL).save_safe(tmp_path / "model")
    with pytest.raises(ValueError, match="OwnAlgorithm"):
        OwnAlgorithm("MlpPolicy", box_env(), **SMALL).save_safe(tmp_path / "model")
    model = make(CPQL)
    path = model.save_safe(tmp_path / "model")
    before = path.read_bytes()
    next(model.actor.parameters()).data[0] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        model.save_safe(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


# --- files of a stranger


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return trained(CPQL).save_safe(tmp_path_factory.mktemp("safe") / "model")


def forge(path, good, change=None, tensors=None):
    """Write a file with a valid checksum, as an attacker would: only what it says is changed."""
    with safe_open(good, framework="pt") as file:
        ours = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    config = config if change is None else (change(config) or config)
    ours = ours if tensors is None else tensors(ours)
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(ours, path, {"format": "sb3_consistency 1", "config": text, "sha256": _digest(text, ours)})
    return path


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_not_opened(good, tmp_path):
    canary, bad = tmp_path / "canary", tmp_path / "bad.safetensors"
    th.save({"policy.x": Canary(canary)}, bad)  # a zip
    with pytest.raises(SafeLoadError, match="nothing was unpickled"):
        load_safe(bad)
    bad.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(SafeLoadError, match="nothing was unpickled"):
        load_safe(bad)
    header = json.dumps({"__metadata__": {"format": "sb3_consistency 1", "config": "{}"}}).encode()
    bad.write_bytes(struct.pack("<Q", len(header)) + header + pickle.dumps(Canary(canary)))
    with pytest.raises(SafeLoadError, match="damaged"):
        load_safe(bad)
    with pytest.raises(SafeLoadError, match="configuration"):
        load_safe(forge(bad, good, lambda c: pickle.dumps(Canary(canary)).decode("latin1") and "[1]"))
    assert not canary.exists()


def put(*keys):
    *where, value = keys

    def change(config):
        for key in where[:-1]:
            config = config[key]
        config[where[-1]] = value

    return change


def policy_kwargs(**kwargs):
    return put("arguments", "policy_kwargs", {"dict": kwargs})


SYSTEM = {"class": "os.system"}
BAD_CONFIGS = {
    "algorithm that is a function": (put("algorithm", "os.system"), "none of"),
    "algorithm that is a list": (put("algorithm", [1]), "none of"),
    "another algorithm": (put("algorithm", "ConsistencyBC"), "unknown|missing"),
    "policy that is a module": (put("policy", "os"), "policy 'os' is none of"),
    "path traversal": (put("policy", "../../etc/passwd"), "is none of"),
    "class os.system": (policy_kwargs(activation_fn=SYSTEM), r"'os.system' is none of the classes"),
    "class by a path": (policy_kwargs(optimizer_class={"class": "../evil.Adam"}), "none of the classes"),
    "unpickling class": (policy_kwargs(features_extractor_class={"class": "torch.load"}), "none of the classes"),
    "class of the wrong kind": (policy_kwargs(activation_fn={"class": "torch.optim.Adam"}), "activation_fn must be"),
    "buffer that is no buffer": (put("arguments", "replay_buffer_class", {"class": "torch.nn.ReLU"}), "replay_buffer_class"),
    "folder of another machine": (
        put("arguments", "replay_buffer_kwargs", {"dict": {"folder": "/etc"}}),
        "a file does not choose where this machine writes",
    ),
    "action noise": (put("arguments", "action_noise", 3), "action_noise"),
    "unknown tag": (put("arguments", "gamma", {"py/reduce": []}), "unknown entry"),
    "unknown argument": (put("arguments", "tensorboard_log", "/etc"), "unknown \\['tensorboard_log'\\]"),
    "missing argument": (lambda c: c["arguments"].pop("gamma") and None, "missing \\['gamma'\\]"),
    "unknown attribute": (put("state", "predict", 1), "unknown \\['predict'\\]"),
    "negative counter": (put("state", "_n_updates", -1), "_n_updates"),
    "refused value": (put("arguments", "batch_size", 0), "batch_size"),
    "text for a number": (put("arguments", "batch_size", "many"), "refuses"),
    "giant layer": (policy_kwargs(net_arch=[10**9]), "too large"),
    "large layers": (policy_kwargs(net_arch=[10**6, 10**6, 10**6]), "larger than the weights in the file"),
    "other layers": (policy_kwargs(net_arch=[33, 32]), "has shape"),
    "many layers": (policy_kwargs(net_arch=[1] * 20_000), "entries"),
    "many candidates": (put("arguments", "n_eval_candidates", 10**12), "too large"),
    "giant buffer": (put("arguments", "buffer_size", 10**15), "too large"),
    "many large spaces": (
        put("observation_space", {"kind": "Dict", "spaces": {str(i): {"kind": "Box", "shape": [2**20]} for i in range(8)}}),
        "spaces of more than",
    ),
    "overflowing space": (
        put("observation_space", {"kind": "MultiDiscrete", "nvec": [2**62] * 4, "start": [0] * 4}),
        "spaces of more than",
    ),
    "no reward function": (put("state", "run.reward_function", {"class": "torch.nn.ReLU"}), "reward_function must be"),
    "no returns": (put("state", "run.reference_returns", "x"), "reference_returns must be"),
    "no flag": (put("state", "run.was_pretrained", "no"), "was_pretrained must be"),
    "negative counter of the run": (put("state", "run.curriculum_end", -1), "curriculum_end must be"),
    "giant space": (
        put("observation_space", {"kind": "Box", "shape": [10**12], "dtype": "float32", "low": 0, "high": 1}),
        "spaces of more than",
    ),
    "object space": (put("observation_space", {"kind": "Box", "shape": [3], "dtype": "object", "low": 0, "high": 1}), "dtype"),
    "no space": (put("observation_space", 3), "configuration"),
    "unbounded actions": (
        put("action_space", {"kind": "Box", "shape": [1], "dtype": "float32", "low": "-inf", "high": 1}),
        "bounds",
    ),
    "discrete actions": (put("action_space", {"kind": "Discrete", "n": 3, "start": 0}), "Box"),
    "no learning rates": (put("learning_rates", {}), "optimizer"),
    "deep nesting": (lambda c: "[" * 100_000 + "]" * 100_000, "damaged"),
    "not an object": (lambda c: "[1, 2]", "not an object"),
    "not JSON": (lambda c: "{'a': __import__('os')}", "damaged"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_malicious_configurations_are_refused(case, good, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    change, message = BAD_CONFIGS[case]
    with pytest.raises(SafeLoadError, match=message):
        load_safe(forge(tmp_path / "bad.safetensors", good, change))
    assert not called


def test_what_a_file_of_before_does_not_know_of_a_run_is_as_in_a_new_one(good, tmp_path):
    path = forge(tmp_path / "old.safetensors", good, lambda config: config["state"].pop("run.in_vec_normalize") and None)
    assert load_safe(path).run.in_vec_normalize is False


def swap(name, value):
    return lambda tensors: {**tensors, name: value(tensors[name])}


WEIGHT = "policy.critic.obs_normalizer.entries.entry0.mean"
BAD_TENSORS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != WEIGHT}, r"missing \['critic.obs"),
    "unknown": (lambda t: {**t, "policy.../../evil": th.zeros(1)}, r"unknown \['../../evil'\]"),
    "unknown kind": (lambda t: {**t, "evil": th.zeros(1)}, "unknown tensor 'evil'"),
    "wrong shape": (swap(WEIGHT, lambda w: th.zeros(7)), r"has shape \(7,\)"),
    "wrong type": (swap(WEIGHT, lambda w: w.double()), "float64"),
    "NaN": (swap(WEIGHT, lambda w: w * float("nan")), "NaN or infinite"),
    "infinity": (swap("optimizer.actor.0.exp_avg", lambda w: w + float("inf")), "NaN or infinite"),
    "optimizer state of another shape": (swap("optimizer.actor.0.exp_avg", lambda w: th.zeros(7)), "expected"),
    "optimizer of no network": (lambda t: {**t, "optimizer.x.0.exp_avg": th.zeros(1)}, "optimizer"),
    "optimizer of no parameter": (lambda t: {**t, "optimizer.actor.999.exp_avg": th.zeros(1)}, "optimizer"),
    "oddly named": (lambda t: {**t, "optimizer.actor": th.zeros(1)}, "optimizer"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_wrong_tensors_are_refused(case, good, tmp_path):
    tensors, message = BAD_TENSORS[case]
    with pytest.raises(SafeLoadError, match=message):
        load_safe(forge(tmp_path / "bad.safetensors", good, tensors=tensors))


def test_declared_sizes_allocate_nothing(tmp_path):
    bad = tmp_path / "bad.safetensors"
    entry = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"policy.x": entry, "__metadata__": {"format": "sb3_consistency 1", "config": "{}"}}).encode()
    bad.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(SafeLoadError, match="damaged"):
        load_safe(bad)
    for length in (2**63, 2**40, 2**25):
        bad.write_bytes(struct.pack("<Q", length) + header)
        with pytest.raises(SafeLoadError, match="header"):
            load_safe(bad)


def test_other_files_are_told(good, tmp_path):
    with pytest.raises(SafeLoadError, match="no such file"):
        load_safe(tmp_path / "missing")
    with pytest.raises(SafeLoadError, match="no such file"):
        load_safe(tmp_path)
    save_file({"x": th.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SafeLoadError, match=r"not from save_safe\(\)"):
        load_safe(tmp_path / "other.safetensors")
    make(CPQL, buffer_size=10).save_replay_buffer(tmp_path / "buffer.safetensors")
    with pytest.raises(SafeLoadError, match=r"no model but a replay buffer: load_replay_buffer\(\)"):
        load_safe(tmp_path / "buffer.safetensors")
    with pytest.raises(SafeLoadError, match=r"it holds a CPQL: load it with CPQL\.load_safe"):
        ConsistencyBC.load_safe(good)
    with pytest.raises(SafeLoadError, match=r"nothing was unpickled"):
        model = trained(CPQL)
        model.save(tmp_path / "model.zip")
        load_safe(tmp_path / "model.zip")
