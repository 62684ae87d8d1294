"""Exported policies act as the model does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC, DiffusionQL
from sb3_consistency.__main__ import main
from sb3_consistency.files.export import SUFFIXES, ExportedPolicy
from tests.conftest import SMALL, VectorEnv, make_arrays
from tests.test_loading import GoalEnv

onnxruntime = pytest.importorskip("onnxruntime")
SPACE = spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([3.0, 5.0], np.float32))


def run(path, inputs, names=("observation",)):
    if path.suffix == ".pt":
        return th.jit.load(path)(*inputs).numpy()
    if path.suffix == ".pt2":
        return th.export.load(path).module()(*inputs).numpy()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


def trained(cls, env, **kwargs):
    model = cls("MlpPolicy", env, **{**SMALL, **kwargs})
    model.load_dataset(make_arrays(action_dim=2))
    return model.pretrain(20)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_file_that_was_there(suffix, tmp_path):
    """PyTorch's writer of files would end the process."""
    program = f"""
import resource, signal
from tests.test_export import *
model, path = CPQL("MlpPolicy", VectorEnv(), **SMALL), r"{tmp_path / "policy"}{suffix}"
open(path, "w").write("before")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with pytest.raises(OSError):
    model.export(path)
assert open(path).read() == "before"
"""
    pytest.importorskip("resource")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    assert [p.name for p in tmp_path.iterdir()] == [f"policy{suffix}"]


# writing ONNX takes seconds: once per kind of model
CASES = [
    (CPQL, {}, ".onnx"),
    (DiffusionQL, {"sampling_steps": 3}, ".onnx"),
    *((cls, {}, suffix) for cls in (CPQL, ConsistencyAC, DiffusionQL) for suffix in (".pt2", ".pt")),
    (CPQL, {"bc_loss": "distill"}, ".pt2"),
    (CPQL, {"policy_kwargs": {"network": "ln_resnet", "net_arch": [16, 16]}}, ".pt2"),
]


@pytest.mark.parametrize(("cls", "kwargs", "suffix"), CASES)
def test_deterministic_export_equals_predict_for_any_batch(cls, kwargs, suffix, tmp_path):
    model = trained(cls, VectorEnv(action_space=SPACE), **kwargs)
    path = model.export(tmp_path / f"policy{suffix}")
    for batch in (1, 2, 7):
        obs = np.random.default_rng(batch).uniform(-1, 1, (batch, 3)).astype(np.float32)
        expected = model.predict(obs, deterministic=True)[0]
        np.testing.assert_allclose(run(path, [th.as_tensor(obs)]), expected, atol=1e-5 * 7)  # 1e-5 of the range
    assert len(np.unique(expected.round(3), axis=0)) > 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_noise_is_an_input_of_a_stochastic_export(suffix, tmp_path):
    model = trained(ConsistencyAC, VectorEnv(action_space=SPACE), n_candidates=1)
    path = model.export(tmp_path / f"policy{suffix}", deterministic=False)
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    th.manual_seed(3)
    expected = model.predict(obs)[0]
    th.manual_seed(3)
    noise = th.randn(2, 5, 2).transpose(0, 1).contiguous()
    np.testing.assert_allclose(run(path, [th.as_tensor(obs), noise], ["observation", "noise"]), expected, atol=7e-5)


def test_onnx_files_leave_out_the_slow_activation_and_stand_large_numbers(tmp_path):
    import onnx

    model = trained(CPQL, VectorEnv(action_space=SPACE))
    with th.no_grad():
        first, *_, last = (layer for layer in model.actor.model.network.layers if isinstance(layer, th.nn.Linear))
        first.weight.mul_(1000)  # exp(x) alone would overflow
        last.weight.div_(1000)  # actions between their bounds
    path = model.export(tmp_path / "policy.onnx")
    assert not {node.op_type for node in onnx.load(path).graph.node} & {"Mish", "Softplus"}
    obs = np.random.default_rng(0).uniform(-9, 9, (50, 3)).astype(np.float32)
    expected = model.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(run(path, [th.as_tensor(obs)]), expected, atol=7e-5)
    assert len(np.unique(expected.round(3), axis=0)) > 1


def test_vec_normalize_goes_into_the_file(tmp_path):
    env = VecNormalize(DummyVecEnv([lambda: VectorEnv(action_space=SPACE)]), clip_obs=0.8)
    model = CPQL("MlpPolicy", env, learning_starts=10, **SMALL).learn(40)
    path = model.export(tmp_path / "policy.pt2")
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    expected = model.predict(env.normalize_obs(obs), deterministic=True)[0]
    np.testing.assert_allclose(run(path, [th.as_tensor(obs)]), expected, atol=7e-5)
    assert not np.allclose(model.predict(obs, deterministic=True)[0], expected, atol=1e-3)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_dict_observations_and_shaped_actions(suffix, tmp_path):
    space = spaces.Dict({"b": spaces.Box(-1, 1, (3,), np.float32), "a": spaces.Discrete(4)})
    env = VectorEnv(observation_space=space, action_space=spaces.Box(-1, 2, (2, 2), np.float32))
    model = CPQL("MultiInputPolicy", env, learning_starts=10, **SMALL).learn(30)
    path = model.export(tmp_path / f"policy{suffix}")
    rows = [space.sample() for _ in range(4)]
    batch = {key: np.stack([row[key] for row in rows]) for key in space}
    names = ExportedPolicy(model.actor).input_names()
    actions = run(path, [th.as_tensor(batch[name]) for name in names], names)
    assert actions.shape == (4, 2, 2)
    np.testing.assert_allclose(actions, model.predict(batch, deterministic=True)[0], atol=3e-5)


def test_keys_that_are_names_inside_the_file(tmp_path):
    def model(*keys):
        space = spaces.Dict({key: spaces.Box(-1, 1, (2,), np.float32) for key in keys})
        return CPQL("MultiInputPolicy", VectorEnv(space, SPACE), buffer_size=10, **SMALL)

    names = ["cat", "half_range", "linear", "noise"]  # of an operation, a buffer, a weight; an input of the other kind of file
    inside = model(*names)
    path = inside.export(tmp_path / "policy.onnx")
    batch = {key: x[None] for key, x in inside.observation_space.sample().items()}
    actions = run(path, [th.as_tensor(batch[name]) for name in names], names)
    np.testing.assert_allclose(actions, inside.predict(batch, deterministic=True)[0], atol=7e-5)
    for key, deterministic in (("noise", False), ("action", True)):
        with pytest.raises(ValueError, match=f"key '{key}'"):
            model(key).export(tmp_path / "ambiguous.onnx", deterministic)
    assert not (tmp_path / "ambiguous.onnx").exists()


def test_exporting_makes_folders_and_leaves_the_model_as_it_was(tmp_path):
    model = trained(CPQL, VectorEnv(action_space=SPACE))
    model.policy.set_training_mode(True)
    model.actor.model.network.layers[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.actor.parameters()]
    model.export(tmp_path / "new" / "folder" / "policy.pt2")
    assert [p.requires_grad for p in model.actor.parameters()] == before and len(set(before)) == 2
    assert model.actor.training and model.actor.device == model.device
    model.pretrain(3)


def test_bounds_of_more_digits_than_the_file_has(tmp_path):
    space = spaces.Box(np.array([-0.1, 0.3]), np.array([0.1, 0.7]), dtype=np.float64)
    model = CPQL("MlpPolicy", VectorEnv(action_space=space), deterministic_policy="current", **SMALL)
    with th.no_grad():
        model.actor.model.network.layers[-1].weight.mul_(10_000)  # nearly every action at a bound
    obs = th.as_tensor(np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32))
    actions = run(model.export(tmp_path / "policy.pt"), [obs]).astype(np.float64)
    at_a_bound = np.isclose(actions, space.low, atol=1e-6) | np.isclose(actions, space.high, atol=1e-6)
    assert at_a_bound.mean() > 0.8 and all(map(space.contains, actions))


def test_a_model_with_hindsight_is_exported_without_its_environment(tmp_path):
    CPQL("MultiInputPolicy", GoalEnv(), replay_buffer_class=HerReplayBuffer, **SMALL).learn(30).save(tmp_path / "her")
    command = ["export", "--algo", "cpql", "--model", str(tmp_path / "her"), "--output", str(tmp_path / "her.pt")]
    assert main(command) == 0 and (tmp_path / "her.pt").exists()


@pytest.mark.parametrize(("cls", "suffix"), [(ConsistencyBC, ".onnx"), (RACTD, ".onnx"), (RACTD, ".pt")])
def test_a_history_goes_in_and_a_chunk_comes_out(cls, suffix, tmp_path):
    stages = {"teacher_steps": 5, "reward_steps": 5} if cls is RACTD else {}
    model = trained(cls, VectorEnv(action_space=SPACE), horizon=4, history=3, **stages)
    path = model.export(tmp_path / f"policy{suffix}")
    for batch in (1, 5):
        history = th.as_tensor(np.random.default_rng(batch).uniform(-1, 1, (batch, 3, 3)).astype(np.float32))
        with th.no_grad():
            expected = model.policy.unscale_plans(model.policy.make_plans(history, True))
        actions = run(path, [history])
        assert actions.shape == (batch, 4, 2)
        np.testing.assert_allclose(actions, expected, atol=7e-5)


def test_planners_that_do_not_act_or_plan_states_are_not_exported(tmp_path):
    with pytest.raises(ValueError, match="can't act yet"):
        RACTD("MlpPolicy", VectorEnv(action_space=SPACE), **SMALL).export(tmp_path / "policy.pt")


def test_bad_exports_are_refused(tmp_path, capsys):
    model = trained(CPQL, VectorEnv(action_space=SPACE))
    with pytest.raises(ValueError, match=r"\.onnx"):
        model.export(tmp_path / "policy.zip")
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10).save(tmp_path / "sac")
    assert main(["export", "--algo", "sac", "--model", str(tmp_path / "sac"), "--output", "x.pt2"]) == 1
    assert "no generative actor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [({}, []), ({"horizon": 4, "history": 2}, ["--executed-steps", "2"]), ({"horizon": 3}, ["--ensemble"])],
)
def test_export_command_and_the_control_loop_without_torch(kwargs, options, tmp_path, capsys):
    CPQL("MlpPolicy", "Pendulum-v1", **kwargs, **SMALL).save(tmp_path / "model")
    policy = tmp_path / "policy.onnx"
    assert main(["export", "--algo", "cpql", "--model", str(tmp_path / "model"), "--output", str(policy)]) == 0
    assert "Exported" in capsys.readouterr().out
    code = (
        "import sys; sys.modules['torch'] = sys.modules['stable_baselines3'] = None\n"
        "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "examples/03_onnx_control.py",
        str(policy),
        "--env",
        "Pendulum-v1",
        "--episodes",
        "1",
        *options,
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "return" in out
