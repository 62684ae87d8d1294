"""rl-zoo3's commands work with our algorithms: training, enjoying, filming, plotting, tuning, sharing."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import save_to_pkl

import sb3_consistency
from sb3_consistency import CPQL, load_vec_normalize, open_dataset, record_dataset, swing_up
from sb3_consistency.__main__ import main
from sb3_consistency.data.safe_state import BufferFile
from sb3_consistency.zoo import register
from sb3_consistency.zoo.datasets import dataset_key
from sb3_consistency.zoo.linear_schedules import LinearStepSchedule
from sb3_consistency.zoo.register import algorithm_names, canonical, default_config, zoo_class
from sb3_consistency.zoo.safe_files import save_buffer
from tests.test_resume import KilledError

pytestmark = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="rl-zoo3 is not installed")
ROOT = Path(__file__).parents[1]
KEYS = list(algorithm_names())
OFFLINE_ONLY = [key for key in KEYS if zoo_class(key).offline_only]
ONLINE = [key for key in KEYS if key not in OFFLINE_ONLY]
TINY = ["-params", "policy_kwargs:dict(net_arch=[8])", "batch_size:8", "learning_starts:5"]
DATASET = "test/pendulum/mixed-v0"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """rl-zoo3 replaces Gymnasium's TimeLimit: not for the other tests of this process."""
    modules = [gym.wrappers, gym.wrappers.common]
    before = [module.TimeLimit for module in modules]
    register()
    yield
    for module, time_limit in zip(modules, before, strict=True):
        module.TimeLimit = time_limit


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.fixture(scope="module")
def minari(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minari")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    for name, seed in {DATASET: 0, "test/pendulum/more-v0": 1}.items():
        record_dataset(name, "Pendulum-v1", [swing_up(0.5, seed), swing_up(4.0, seed)], 420)
    yield folder
    del os.environ["MINARI_DATASETS_PATH"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of every algorithm that learns online, with checkpoints and evaluations."""
    logs = tmp_path_factory.mktemp("logs")
    for seed in ("1", "2"):
        for algo in ("consistency_ac", "cpql"):
            options = ["--eval-freq", 20, "--eval-episodes", 2, "--save-freq", 20, "--env-kwargs", "max_episode_steps:20"]
            zoo("train", "--algo", algo, "--env", "Pendulum-v1", "-n", 40, "-f", logs, "--seed", seed, *TINY, *options)
    return logs


def zoo(*args, status=0):
    assert main([str(arg) for arg in args]) == status


def config_of(run):
    """The saved hyperparameters of a run, as a dict."""
    (path,) = run.glob("*/config.yml")
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))


def args_of(run):
    (path,) = run.glob("*/args.yml")
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))


def load(key, path):
    return getattr(sb3_consistency, algorithm_names()[key]).load(path)


# --- registering -----------------------------------------------------------------------------------------------------


def test_both_spellings_are_registered():
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    for key, name in algorithm_names().items():
        assert canonical(name.lower()) == canonical(key) == key
        for table in (ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER):
            assert key in table and name.lower() in table
        assert ALGOS[key].__name__ == name
    assert canonical("sac") == "sac"


def test_stand_in_for_requests_does_not_stay():
    assert getattr(sys.modules.get("requests"), "__file__", None) or "requests" not in sys.modules


def test_cures_leave_the_healthy_alone(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError
    from rl_zoo3 import load_from_hub

    from sb3_consistency.zoo import workarounds

    for broken, wanted in ((KeyError, EntryNotFoundError), (Exception, Exception)):
        monkeypatch.setattr(load_from_hub, "HTTPError", broken)
        workarounds.import_load_from_hub()
        assert load_from_hub.HTTPError is wanted
    workarounds.import_push_to_hub()  # which keeps what it finds at its first import
    library = import_module("huggingface_sb3.push_to_hub")
    monkeypatch.setattr(library, "generate_metadata", print, raising=False)
    workarounds.import_push_to_hub()
    assert library.generate_metadata is print


def test_missing_rl_zoo3_names_the_extra():
    code = "import sys; sys.modules['rl_zoo3'] = None; from sb3_consistency.__main__ import main; sys.exit(main(['train']))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "sb3-consistency[zoo]" in done.stderr


def test_acting_needs_no_replay_buffer_and_forgets_no_size(tmp_path):
    model = sb3_consistency.CPQL("MlpPolicy", "Pendulum-v1", buffer_size=123, policy_kwargs={"net_arch": [8]})
    model.save(tmp_path / "m.zip")
    loaded = zoo_class("cpql").load(tmp_path / "m.zip")
    assert loaded.buffer_size == 123
    assert loaded.replay_buffer is None or loaded.replay_buffer.buffer_size == 1
    assert zoo_class("cpql").load(tmp_path / "m.zip", env=model.env, buffer_size=None).replay_buffer.buffer_size == 123
    assert zoo_class("cpql").load(tmp_path / "m.zip", env=model.env, buffer_size=50).buffer_size == 50
    trained = zoo_class("cpql").load(tmp_path / "m", env=model.env).learn(3)
    assert trained.buffer_size == trained.replay_buffer.buffer_size == 123 and trained.replay_buffer.size() == 3


@pytest.mark.parametrize("command", ["train", "enjoy", "all-plots"])
def test_help_is_rl_zoo3s(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert ("--dataset" in capsys.readouterr().out) == (command == "train")


# --- hyperparameter files --------------------------------------------------------------------------------------------


def sections():
    for key in KEYS:
        for offline in (False, True):
            for name, section in yaml.safe_load(default_config(key, offline).read_text()).items():
                yield key, offline, name, section


# keys that rl-zoo3 takes out before it builds the model
ZOO_KEYS = {"n_timesteps", "n_envs", "normalize", "env_wrapper", "vec_env_wrapper", "frame_stack", "callback"}
ZOO_KEYS |= {"monitor_kwargs", "env_kwargs", "noise_type", "noise_std"}


def test_every_key_of_the_files_is_accepted():
    from rl_zoo3 import exp_manager

    model_classes = {key: getattr(sb3_consistency, name) for key, name in algorithm_names().items()}
    spaces = {"CnnPolicy": None, "MlpPolicy": "Pendulum-v1"}
    for key, offline, name, section in sections():
        where = f"{key}{' offline' if offline else ''}: {name}"
        kwargs = {k: v for k, v in section.items() if k not in ZOO_KEYS}
        assert not [k for k, v in kwargs.items() if isinstance(v, str) and v[:1].isdigit()], f"{where}: a number as string"
        for k in ("policy_kwargs", "replay_buffer_kwargs", "replay_buffer_class"):
            if isinstance(kwargs.get(k), str):
                kwargs[k] = eval(kwargs[k], vars(exp_manager))
        # plans of states are for environments with goals
        policy = kwargs.pop("policy", "MultiInputPolicy" if kwargs.get("plan_of") == "states" else "MlpPolicy")
        env = GoalEnv() if policy == "MultiInputPolicy" else spaces[policy]
        kwargs |= {"policy_kwargs": {**kwargs.get("policy_kwargs", {}), "net_arch": [4]}, "buffer_size": 10}
        model_classes[key](policy, env, **kwargs)
        assert not offline or "policy" not in section, f"{where}: the policy follows from the data"
        assert offline or not set(section) & {"dataset", "pretrain_steps"}, where


class GoalEnv(gym.Env):
    """Just enough of a goal environment to build models for."""

    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation_space = gym.spaces.Dict(
        observation=gym.spaces.Box(-1.0, 1.0, (4,), np.float32), achieved_goal=action_space, desired_goal=action_space
    )

    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.zeros(len(achieved_goal))


def test_environments_and_datasets_that_were_promised():
    for key in ONLINE:
        names = yaml.safe_load(default_config(key, False).read_text()).keys()
        for name in ("Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3", "BipedalWalker-v3"):
            assert name in names
        assert {f"{env}-v5" for env in ("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid")} <= names
        assert {"PointMaze_UMaze-v3", "AntMaze_UMaze-v5", "AdroitHandPen-v1", "FrankaKitchen-v1"} <= names
    for key in KEYS:
        names = yaml.safe_load(default_config(key, True).read_text()).keys()
        assert "default" in names
        # the file of those that nothing is published of
        for env in ("hopper", "halfcheetah", "walker2d") if default_config(key, True).stem == key else ():
            assert {f"mujoco/{env}/medium-v0", f"{env}-medium-replay-v2", f"{env}-medium-expert-v2"} <= names
    assert dataset_key("b/x-v0, a/x-v0") == dataset_key(["a/x-v0", "b/x-v0"])


def test_published_settings_are_the_published_ones():
    read = {key: yaml.safe_load(default_config(key, True).read_text()) for key in KEYS}
    walker = read["consistency_ac"]["mujoco/walker2d/medium-v0"]
    assert (walker["eta"], walker["sampling_steps"], walker["max_grad_norm"], walker["q_norm"]) == (1.0, 5, 1.0, True)
    assert walker["bc_loss"] == "consistency" and walker["loss_scaling"] and walker["pretrain_steps"] == 2_000_000
    cheetah = read["cpql"]["mujoco/halfcheetah/medium-v0"]
    assert (cheetah["eta"], cheetah["max_grad_norm"], cheetah["expectile"], cheetah["alpha"]) == (2.0, 9.0, 0.7, 1.0)
    for key in ("consistency_ac", "cpql", "diffusion_ql"):
        # candidates from whole noise
        kwargs = [eval(section.get("policy_kwargs", "{}")) for section in read[key].values() if "n_eval_candidates" in section]
        assert kwargs and all(each["noise_scale"] == 1.0 for each in kwargs)
    maze = read["diffusion_ql"]["D4RL/antmaze/medium-play-v1"]
    assert (maze["eta"], maze["actor_learning_rate"], maze["max_q_backup"]) == (2.0, 1e-3, True)
    assert maze["dataset_kwargs"] == {"reward_transform": "antmaze"}
    assert read["ractd"]["mujoco/walker2d/medium-v0"]["reward_weight"] == 0.4
    assert read["ractd"]["D4RL/pointmaze/large-v2"]["horizon"] == 96
    pen = read["diffusion_bc"]["D4RL/pen/human-v2"]
    assert (pen["n_timesteps"], pen["learning_rate"], pen["max_grad_norm"]) == (1_000_000, 3e-5, 7.0)


@pytest.mark.filterwarnings("ignore:.*is out of date.*:DeprecationWarning")
@pytest.mark.parametrize("name", sorted({name for _, offline, name, _ in sections() if not offline and "-v" in name}))
def test_environments_of_the_files_run(name):
    gym.register_envs(pytest.importorskip("gymnasium_robotics"))
    gym.spec(name)  # a misspelt id is no missing simulator
    try:
        env = gym.make(name)
    except Exception as error:  # whatever the simulator raises: no Box2D, MuJoCo too new for Pusher-v4 and FrankaKitchen
        pytest.skip(f"{name}: {error!r}")
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(100):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    env.close()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ONLINE)
def test_train(key, tmp_path):
    algo = algorithm_names()[key].lower()
    zoo("train", "--algo", algo, "--env", "Pendulum-v1", "-n", 20, "-f", tmp_path, *TINY, "--eval-freq", 10)
    run = tmp_path / key / "Pendulum-v1_1"
    assert load(key, run / "Pendulum-v1.zip").num_timesteps == 20
    assert (run / "evaluations.npz").exists() and (run / "best_model.zip").exists()
    args = args_of(run)
    assert (args["algo"], args["env"], args["n_timesteps"], args["dataset"]) == (key, "Pendulum-v1", 20, None)
    assert (run / "Pendulum-v1" / "command.txt").read_text().startswith("python -m sb3_consistency train --algo ")


def test_scripts_of_ones_own(tmp_path, monkeypatch):
    import rl_zoo3.train

    register()
    command = ["--algo", "cpql", "--env", "Pendulum-v1", "-n", "10", "-f", str(tmp_path), "--eval-freq", "-1", *TINY]
    monkeypatch.setattr(sys, "argv", ["mine.py", *command])
    rl_zoo3.train.train()
    assert (tmp_path / "cpql/Pendulum-v1_1/Pendulum-v1.zip").exists()


def test_other_algorithms_still_train(tmp_path):
    zoo("train", "--algo", "sac", "--env", "Pendulum-v1", "-n", 10, "-f", tmp_path, "-params", "buffer_size:50")
    zoo("train", "--algo", "sac", "--env", "Pendulum-v1", "--dataset", "x.npz", "-f", tmp_path, status=1)


def test_continue_training_with_its_replay_buffer(tmp_path):
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 20, "-f", tmp_path, "--save-replay-buffer"]
    command += ["--eval-freq", "-1", *TINY, "buffer_size:1000"]
    zoo(*command)
    first, second = (tmp_path / f"cpql/Pendulum-v1_{i}" for i in (1, 2))
    assert BufferFile(first / "replay_buffer.safetensors").n_filled == 20
    zoo(*command, "-i", first / "Pendulum-v1.zip")
    assert BufferFile(second / "replay_buffer.safetensors").n_filled == 40
    assert not list(tmp_path.rglob("*.pkl"))
    source = open_dataset(second)
    assert sum(source.lengths) == 40 and source.make_env().spec.id == "Pendulum-v1"


def test_pickles_of_before_still_load(tmp_path):
    """Those that rl-zoo3 itself writes, with one warning of each."""
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 20, "-f", tmp_path, "--save-replay-buffer"]
    command += ["--eval-freq", 10, "--eval-episodes", 1, *TINY, "buffer_size:1000", "normalize:True"]
    zoo(*command)
    run, again = (tmp_path / f"cpql/Pendulum-v1_{i}" for i in (1, 2))
    buffer, statistics = run / "replay_buffer.safetensors", run / "Pendulum-v1/vecnormalize.safetensors"
    env = load_vec_normalize(statistics, make_vec_env("Pendulum-v1"))
    model = CPQL("MlpPolicy", env, buffer_size=1000)
    model.load_replay_buffer(buffer)
    save_to_pkl(buffer.with_suffix(".pkl"), model.replay_buffer)
    env.save(str(statistics.with_suffix(".pkl")))
    for file in (buffer, statistics):
        file.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo(*command, "-i", run / "Pendulum-v1.zip")
        zoo("enjoy", "--algo", "cpql", "--env", "Pendulum-v1", "-f", tmp_path, "-n", 5, "--no-render", "--exp-id", 1)
        assert sum(open_dataset(run).lengths) == 20
    told = [str(w.message) for w in caught if "is a pickle" in str(w.message)]
    assert sorted(Path(text.split(" is a pickle")[0]).name for text in told) == ["replay_buffer.pkl", "vecnormalize.pkl"]
    assert BufferFile(again / "replay_buffer.safetensors").n_filled == 40
    continued = load_vec_normalize(again / "Pendulum-v1/vecnormalize.safetensors", make_vec_env("Pendulum-v1"))
    assert continued.obs_rms.count > env.obs_rms.count


def test_a_buffer_that_no_safe_file_holds_is_saved_as_a_pickle(tmp_path, capsys):
    model = CPQL("MlpPolicy", "Pendulum-v1", replay_buffer_class=Counting, buffer_size=10)
    with pytest.raises(ValueError, match="this Counting may have more to save"):
        model.save_replay_buffer(tmp_path / "buffer.safetensors")
    save_buffer(model, tmp_path)
    assert "It is saved as a pickle" in capsys.readouterr().out
    assert type(pickle.loads((tmp_path / "replay_buffer.pkl").read_bytes())) is Counting


class Counting(ReplayBuffer):
    """A buffer of someone's own."""


def test_test_environments_have_the_statistics_of_the_run(tmp_path):
    """And frames stacked on them, as rl-zoo3's; SB3's algorithms keep their pickles."""
    import rl_zoo3.enjoy

    options = ["--eval-freq", -1, "-params", "normalize:dict(clip_obs=3.0)", "learning_starts:50", "buffer_size:50"]
    for algo in ("cpql", "sac"):
        zoo("train", "--algo", algo, "--env", "Pendulum-v1", "-n", 30, "-f", tmp_path, *options)
    files = {path.relative_to(tmp_path).parts[0]: path.name for path in tmp_path.rglob("vecnormalize.*")}
    assert files == {"cpql": "vecnormalize.safetensors", "sac": "vecnormalize.pkl"}
    for algo in files:
        stats_path = str(tmp_path / algo / "Pendulum-v1_1/Pendulum-v1")
        hyperparams, _ = rl_zoo3.enjoy.get_saved_hyperparams(stats_path, test_mode=True)
        hyperparams["frame_stack"] = 2
        env = rl_zoo3.enjoy.create_test_env("Pendulum-v1", 1, stats_path, hyperparams=hyperparams, should_render=False)
        assert env.observation_space.shape == (6,) and type(env.unwrapped).__name__ == "DummyVecEnv"
        inner = env.venv
        assert not inner.training and not inner.norm_reward and inner.clip_obs == 3.0 and inner.obs_rms.count > 20


def test_options_of_the_files(tmp_path):
    """Several environments, normalisation, wrappers, callbacks, dotted policies, schedules: from YAML and -params."""
    section = {
        "n_timesteps": 40,
        "n_envs": 2,
        "policy": "sb3_consistency.policies.policy.MlpPolicy",
        "policy_kwargs": "dict(net_arch=[8], activation_fn=sb3_consistency.generative.networks.Mish)",
        "learning_rate": "lin_3e-4",
        "actor_learning_rate": "lin_1e-3",
        "eta": "lin_2.0",
        "alpha": "5e-1",
        "batch_size": 8,
        "learning_starts": 5,
        "train_freq": [1, "step"],
        "normalize": "dict(norm_obs=True, norm_reward=False)",
        "env_wrapper": [{"rl_zoo3.wrappers.HistoryWrapper": {"horizon": 2}}, "rl_zoo3.wrappers.TimeFeatureWrapper"],
        "monitor_kwargs": "dict(info_keywords=('TimeLimit.truncated',))",
        "callback": "rl_zoo3.callbacks.RawStatisticsCallback",
        "noise_type": "normal",
        "noise_std": 0.1,
    }
    (tmp_path / "mine.yml").write_text(yaml.dump({"Pendulum-v1": section}))
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-f", tmp_path, "-conf", tmp_path / "mine.yml"]
    zoo(*command, "-tb", tmp_path / "tb", "-params", "tau:0.5", "--eval-freq", 20, "--vec-env", "dummy")
    run = tmp_path / "cpql/Pendulum-v1_1"
    model = load("cpql", run / "Pendulum-v1.zip")
    assert (model.tau, model.alpha) == (0.5, 0.5)
    assert model.eta(0) == 2.0 and model.eta(10) < 2.0 and model.eta(10**9) == 0
    assert model.actor_learning_rate(0.5) == pytest.approx(5e-4)
    assert (run / "Pendulum-v1/vecnormalize.safetensors").exists()
    assert list((tmp_path / "tb/Pendulum-v1/CPQL_1").iterdir())
    zoo("enjoy", "--algo", "cpql", "--env", "Pendulum-v1", "-f", tmp_path, "-n", 10, "--no-render")
    (tmp_path / "mine.yml").write_text(yaml.dump({"default": {**section, "eta": "fast"}}))
    zoo(*command, status=1)


def test_python_configuration(tmp_path):
    section = {"n_timesteps": 10, "policy": "MlpPolicy", "policy_kwargs": {"net_arch": [8]}}
    (tmp_path / "config.py").write_text(f"hyperparams = {{'Pendulum-v1': {section}}}")
    zoo("train", "--algo", "cpql", "--env", "Pendulum-v1", "-f", tmp_path, "-conf", tmp_path / "config.py", "--eval-freq", -1)


def test_section_by_name(tmp_path, capsys):
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 10, "-f", tmp_path, "--eval-freq", -1, *TINY]
    zoo(*command, "--hyperparams-id", "chen-2024")
    told = config_of(tmp_path / "cpql/Pendulum-v1_1")
    assert (told["max_grad_norm"], told["alpha"], told["ent_coef"]) == (2.0, 0.05, 0)
    zoo(*command, "--hyperparams-id", "Hoper-v5", status=1)
    assert "hyperparams_id: 'Hoper-v5'" in capsys.readouterr().err


def test_the_section_default_is_the_constructors():
    for key, offline, name, section in sections():
        if name == "default":
            assert section.keys() <= {"n_timesteps", "pretrain_steps", "policy"}, (key, offline)


@pytest.mark.parametrize("key", ONLINE)
def test_the_defaults_for_a_listed_environment(key, tmp_path):
    pytest.importorskip("mujoco")
    command = ["train", "--algo", key, "--env", "Hopper-v5", "-n", 10, "-f", tmp_path, "--eval-freq", -1]
    # those of default.yml are the papers'
    section = ["--hyperparams-id", "default"] if key == "diffusion_ql" else []
    zoo(*command, *section, "-params", "buffer_size:100")
    model = load(key, tmp_path / key / "Hopper-v5_1/Hopper-v5.zip")
    made = getattr(sb3_consistency, algorithm_names()[key])("MlpPolicy", "Hopper-v5", buffer_size=100)
    for name in ("alpha", "eta", "learning_rate", "actor_learning_rate", "max_grad_norm", "learning_starts", "policy_kwargs"):
        assert getattr(model, name) == getattr(made, name), name


def test_step_schedule():
    schedule = pickle.loads(pickle.dumps(LinearStepSchedule(2.0, 10)))
    assert [schedule(step) for step in (0, 5, 10, 20)] == [2.0, 1.0, 0.0, 0.0]
    assert [LinearStepSchedule(2.0, 10, start=5)(step) for step in (0, 5, 10, 15)] == [2.0, 2.0, 1.0, 0.0]


def test_step_schedules_end_with_the_run_that_they_are_given_to(tmp_path):
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 40, "-f", tmp_path, "--eval-freq", -1, "-params"]
    command += [
        "policy_kwargs:dict(net_arch=[8])",
        "batch_size:8",
        "learning_starts:20",
        "train_freq:[2,'step']",
        "eta:'lin_1.0'",
    ]
    zoo(*command)
    first = load("cpql", tmp_path / "cpql/Pendulum-v1_1/Pendulum-v1.zip")
    assert (first.eta(0), first.eta(first.n_updates)) == (1, 0) and first.eta(first.n_updates - 1) > 0
    zoo(*command, "-i", tmp_path / "cpql/Pendulum-v1_1/Pendulum-v1.zip")
    second = load("cpql", tmp_path / "cpql/Pendulum-v1_2/Pendulum-v1.zip")
    assert second.n_updates > first.n_updates
    assert (second.eta(first.n_updates), second.eta(second.n_updates)) == (1, 0) and second.eta(second.n_updates - 1) > 0


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_train_on_a_dataset(key, minari, tmp_path):
    options = ["--eval-freq", 10, "--eval-episodes", 2, "--save-freq", 10, "-P", "-tb", tmp_path / "tb"]
    zoo("train", "--algo", key, "--dataset", DATASET, "--pretrain-steps", 20, "-f", tmp_path, *TINY, *options)
    run = tmp_path / key / "Pendulum-v1_1"
    model = load(key, run / "Pendulum-v1.zip")
    assert model.n_updates == 20 and model.dataset == DATASET
    assert {path.name for path in run.glob("rl_model_*")} == {"rl_model_10_steps.zip", "rl_model_20_steps.zip"}
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [10, 20]
    assert len(list((tmp_path / "tb/Pendulum-v1").iterdir())) == 1
    args = args_of(run)
    assert (args["env"], args["dataset"], args["pretrain_steps"]) == ("Pendulum-v1", DATASET, 20)
    zoo("enjoy", "--algo", key, "--env", "Pendulum-v1", "-f", tmp_path, "-n", 10, "--load-best")


def test_offline_then_online(minari, tmp_path):
    options = ["--eval-freq", 10, "--eval-episodes", 1, "--save-freq", 10]
    datasets = f"{DATASET},test/pendulum/more-v0"
    zoo("train", "--algo", "cpql", "--dataset", datasets, "--pretrain-steps", 20, "-n", 20, "-f", tmp_path, *TINY, *options)
    run = tmp_path / "cpql/Pendulum-v1_1"
    model = load("cpql", run / "Pendulum-v1.zip")
    assert model.n_updates == 40 and model.num_timesteps == 20
    assert model.dataset == config_of(run)["dataset"] == [DATASET, "test/pendulum/more-v0"]
    for phase in (run, run / "pretrain"):  # both count their steps from 0
        assert np.load(phase / "evaluations.npz")["timesteps"].tolist() == [10, 20]
        assert (phase / "rl_model_20_steps.zip").exists()
    # a model that is pretrained goes on online
    zoo(
        "train",
        "--algo",
        "cpql",
        "--dataset",
        DATASET,
        "-n",
        10,
        "-i",
        run / "Pendulum-v1.zip",
        "-f",
        tmp_path,
        "--eval-freq",
        -1,
    )
    assert load("cpql", tmp_path / "cpql/Pendulum-v1_2/Pendulum-v1.zip").n_updates == 50


def test_a_model_that_never_was_pretrained_takes_the_hyperparameters_steps_first(minari, tmp_path):
    command = ["train", "--algo", "cpql", "-f", tmp_path, "--eval-freq", -1, "-n", 20]
    zoo(*command, "--env", "Pendulum-v1", *TINY)
    first = tmp_path / "cpql/Pendulum-v1_1/Pendulum-v1.zip"
    taken = load("cpql", first).n_updates
    zoo(*command, "--dataset", DATASET, "-i", first, *TINY, "pretrain_steps:30")
    assert load("cpql", tmp_path / "cpql/Pendulum-v1_2/Pendulum-v1.zip").n_updates == taken + 30 + 20


@pytest.mark.parametrize(("kill_at", "online"), [(70, False), (35, True)])
def test_a_killed_run_continues_from_its_checkpoints(kill_at, online, minari, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    section = {"policy_kwargs": "dict(net_arch=[8])", "batch_size": 8, "n_candidates": 2, "normalize": True}
    save = {"sb3_consistency.ResumableCheckpointCallback": {"folder": str(checkpoints), "save_freq": 10}}
    kill = {"tests.test_resume.Kill": {"at": kill_at, "online": online}}
    for name, callbacks in {"whole": [], "save": [save], "killed": [save, kill]}.items():
        (tmp_path / f"{name}.yml").write_text(yaml.dump({"default": {**section, "callback": callbacks}}))
    command = ["train", "--algo", "cpql", "--dataset", DATASET, "--pretrain-steps", 150, "-n", 40, "-f", tmp_path]
    command += ["--eval-freq", 10, "--eval-episodes", 1, "--seed", 1, "--env-kwargs", "max_episode_steps:20"]
    zoo(*command, "-conf", tmp_path / "whole.yml")
    with pytest.raises(KilledError):
        zoo(*command, "-conf", tmp_path / "killed.yml")
    zoo(*command, "-conf", tmp_path / "save.yml", "-i", checkpoints)
    whole, continued = (load("cpql", tmp_path / f"cpql/Pendulum-v1_{i}/Pendulum-v1.zip") for i in (1, 3))
    assert continued.num_timesteps == 40 and continued.n_updates == 190
    for name, weights in whole.get_parameters()["policy"].items():
        assert th.equal(weights, continued.get_parameters()["policy"][name]), name
    zoo(*command, "-i", tmp_path / "cpql", status=1)


def test_a_checkpoint_of_the_offline_phase_keeps_its_normalisation(minari, tmp_path):
    command = ["train", "--algo", "cpql", "--dataset", DATASET, "-f", tmp_path, "--eval-freq", -1, *TINY, "normalize:True"]
    zoo(*command, "--pretrain-steps", 10, "-n", 10, "--save-freq", 5)
    checkpoint = tmp_path / "cpql/Pendulum-v1_1/pretrain/rl_model_5_steps.zip"
    zoo(*command, "-n", 10, "-i", checkpoint)
    saved = [tmp_path / "cpql/Pendulum-v1_1/pretrain", tmp_path / "cpql/Pendulum-v1_2"]
    envs = [load_vec_normalize(run / "Pendulum-v1/vecnormalize.safetensors", make_vec_env("Pendulum-v1")) for run in saved]
    counts = [env.obs_rms.count for env in envs]
    assert counts[0] > 400 and counts[1] > counts[0]


def test_dataset_through_keys(minari, tmp_path):
    section = {"n_timesteps": 10, "dataset": DATASET, "pretrain_steps": 1e1, "offline_fraction": "lin_0.5", "batch_size": 8}
    section |= {"dataset_kwargs": {"heldout_fraction": 0.4}, "policy_kwargs": {"net_arch": [8]}}
    (tmp_path / "mine.yml").write_text(yaml.dump({"Pendulum-v1": section}))
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-conf", tmp_path / "mine.yml", "-f", tmp_path]
    zoo(*command, "--eval-freq", -1)
    model = load("cpql", tmp_path / "cpql/Pendulum-v1_1/Pendulum-v1.zip")
    assert model.n_updates == 20 and model.offline_fraction(0.5) == 0.25


def test_tracking_an_offline_run(minari, tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(config=SimpleNamespace(setdefaults=calls.append))
    wandb = SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    command = ["train", "--algo", "cpql", "--dataset", DATASET, "--pretrain-steps", 10, "-f", tmp_path, "--eval-freq", -1]
    zoo(*command, "--track", *TINY)
    assert calls[0]["sync_tensorboard"] and calls[0]["config"]["dataset"] == DATASET
    assert list(tmp_path.glob("runs/*/Pendulum-v1/CPQL_pretrain_1/events*"))


def test_environment_and_section_follow_from_the_dataset(minari, tmp_path, monkeypatch):
    record_dataset("test/long-v0", gym.make("Pendulum-v1", g=5.0, max_episode_steps=30), swing_up(1.0, 0), 60)
    config = {"default": {"n_timesteps": 0, "batch_size": 8}, "test/long-v0,test/x-v0": {"gamma": 0.5}}
    config["test/long-v0"] = {**config["default"], "gamma": 0.9, "policy_kwargs": {"net_arch": [8]}}
    (tmp_path / "mine.yml").write_text(yaml.dump(config))
    command = ["train", "--algo", "cpql", "--dataset", "test/long-v0", "--pretrain-steps", 5, "--eval-freq", 5]
    zoo(*command, "-conf", tmp_path / "mine.yml", "-f", tmp_path, "--env-kwargs", "g:6.0")
    run = tmp_path / "cpql/Pendulum-v1_1"
    assert config_of(run)["gamma"] == 0.9 and config_of(run)["policy"] == "MlpPolicy"
    assert args_of(run)["env_kwargs"] == {"g": 6.0, "max_episode_steps": 30}
    assert (np.load(run / "evaluations.npz")["ep_lengths"] == 30).all()


def test_offline_errors_are_explained(minari, tmp_path, capsys):
    zoo("train", "--algo", "consistency_bc", "--env", "Pendulum-v1", "-n", 5, "-f", tmp_path, status=1)
    assert "No offline data" in capsys.readouterr().err
    arrays = {key: np.zeros((4, 3), np.float32) for key in ("observations", "next_observations")}
    arrays |= {"actions": np.zeros((4, 1)), "rewards": np.zeros(4)}
    np.savez("x.npz", **arrays, terminations=np.zeros(4, bool), truncations=np.array([0, 0, 0, 1], bool))
    zoo("train", "--algo", "cpql", "--dataset", "x.npz", "-f", tmp_path, status=1)
    assert "env" in capsys.readouterr().err
    offline = ["--pretrain-steps", 5, "--eval-freq", -1, "-f", tmp_path, *TINY]
    zoo("train", "--algo", "cpql", "--dataset", "x.npz", "--env", "Pendulum-v1", *offline)


# --- enjoying, filming, plotting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["consistency_ac", "consistencyac", "cpql"])
@pytest.mark.parametrize("which", [[], ["--load-best"], ["--load-checkpoint", 20], ["--load-last-checkpoint", "-P"]])
def test_enjoy(runs, algo, which, capsys):
    zoo("enjoy", "--algo", algo, "--env", "Pendulum-v1", "-f", runs, "-n", 40, "--no-render", *which)
    assert "Mean reward" in capsys.readouterr().out


def test_enjoy_does_not_render_without_a_display(runs, monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if sys.platform.startswith("linux"):
        zoo("enjoy", "--algo", "cpql", "--env", "Pendulum-v1", "-f", runs, "-n", 5)
        assert "No display" in capsys.readouterr().out


def test_record_video(runs, tmp_path):
    zoo("record-video", "--algo", "cpql", "--env", "Pendulum-v1", "-f", runs, "-n", 10, "-o", tmp_path)
    (film,) = tmp_path.glob("final-model-cpql-Pendulum-v1-*.mp4")
    assert film.stat().st_size > 0


@pytest.mark.slow
def test_record_training(runs, tmp_path):
    command = ["record-training", "--algo", "cpql", "--env", "Pendulum-v1", "-f", runs, "-n", 10, "--gif", "-o", "films"]
    zoo(*command)
    assert all((tmp_path / "films" / f"training.{kind}").stat().st_size > 0 for kind in ("mp4", "gif"))


def test_plots(runs, tmp_path):
    zoo("plot-train", "-a", "cpql", "-e", "Pendulum-v1", "-f", runs, "-w", 1, "-o", tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 5_000
    zoo("all-plots", "-a", "cpql", "consistencyac", "-e", "Pendulum-v1", "-f", runs, "-o", "all", "--no-display")
    with open("all.pkl", "rb") as file:
        assert set(pickle.load(file)["Pendulum-v1"]) == {f"{algo}-{runs}" for algo in ("CPQL", "CONSISTENCY_AC")}
    zoo("plot-from-file", "-i", "all.pkl", "-o", "all.png", "--format", "png")
    assert (tmp_path / "all.png").stat().st_size > 5_000


def test_runs_that_failed_do_not_hide_those_with_a_model(tmp_path, capsys):
    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 10, "-f", tmp_path, "--eval-freq", -1]
    zoo(*command, *TINY)
    zoo(*command, "-params", "tau:-1.0", status=1)  # fails when it is built
    zoo("train", "--algo", "consistency_bc", "--env", "Pendulum-v1", "-n", 5, "-f", tmp_path, status=1)  # and in learn()
    assert [path.name for path in tmp_path.glob("cpql/*")] == ["Pendulum-v1_1"] and not list(tmp_path.glob("*_bc/*"))
    enjoy = ["enjoy", "--algo", "cpql", "--env", "Pendulum-v1", "-f", tmp_path, "-n", 5, "--no-render"]
    zoo(*enjoy)
    # of a kind that could not be tidied up: killed
    (tmp_path / "cpql/Pendulum-v1_2").mkdir()
    capsys.readouterr()
    for show in (enjoy, ["record-video", *enjoy[1:-1], "-o", tmp_path]):
        zoo(*show, status=1)
        assert "--exp-id 1" in capsys.readouterr().err
    zoo(*enjoy, "--exp-id", 1)


def test_a_comparison_of_one_run_is_refused_with_the_way_to_draw_it(runs, tmp_path, capsys):
    one = tmp_path / "one/cpql/Pendulum-v1_1"
    shutil.copytree(runs / "cpql/Pendulum-v1_1", one)
    zoo("all-plots", "-a", "cpql", "-e", "Pendulum-v1", "-f", tmp_path / "one", "-o", "one", "--no-display")
    with pytest.raises(SystemExit, match="2"):
        main(["plot-from-file", "-i", "one.pkl", "-o", "one.png", "--format", "png"])
    told = capsys.readouterr().err
    assert "CPQL" in told and "on Pendulum-v1" in told and "plot-train" in told
    with pytest.raises(SystemExit, match="2"):
        main(["plot-from-file", "-i", "nothing"])
    assert "no file nothing.pkl" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plot-from-file"])
    assert "--input must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--env or --dataset"),
        (["--env", "Pendulum-v1", "--storage", "s.log", "--study-name", "n"], "--trial-id belong together"),
        (["--env", "Pendulum-v1", "--trial-id", "0"], "--trial-id belong together"),
        (["--env", "Pendulum-v1", "--storage", "s.log", "--trial-id", "0"], "--trial-id belong together"),
        (["--env", "Pendulum-v1", "--seeds-per-trial", "2"], "--seeds-per-trial is for tuning"),
        (["--env", "Pendulum-v1", "-optimize", "--seeds-per-trial", "0"], "--seeds-per-trial must be at least 1, got 0"),
        (
            ["--env", "Pendulum-v1", "-optimize", "--seeds-per-trial", "2", "--n-jobs", "3"],
            "--n-jobs 3 and --seeds-per-trial 2",
        ),
        (["--env", "Pendulum-v1", "-optimize", "--heartbeat", "0"], "--heartbeat must be at least 1, got 0"),
    ],
)
def test_half_said_commands_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--algo", "cpql", "-f", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_hyperparameters_that_can_not_be_are_told_without_a_traceback(tmp_path, capsys, monkeypatch):
    import optuna

    command = ["train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 10, "-f", tmp_path / "logs", "--eval-freq", -1]
    for words in ([], ["-optimize", "--n-trials", 1]):
        zoo(*command, *words, "-params", "etta:1", status=1)
        assert "unexpected argument 'etta'" in capsys.readouterr().err
    zoo(*command, "-params", "pretrain_steps:10.5", status=1)
    assert "pretrain_steps must be an integer, got 10.5" in capsys.readouterr().err
    monkeypatch.setattr(CPQL, "learn", lambda *args, **kwargs: int([]))
    with pytest.raises(TypeError):
        zoo(*command, *TINY)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("s.log"))
    optuna.create_study(storage=storage, study_name="x").enqueue_trial({"gamma": 0.9})
    for file, study, message in (
        ("new.log", "x", "--storage: there is no file new.log"),
        ("s.log", "y", "there is no study 'y' in --storage"),
        ("s.log", "x", "--trial-id: trial 0 of x, WAITING, has no"),
    ):
        zoo(*command, "--storage", file, "--study-name", study, "--trial-id", 0, status=1)
        assert message in capsys.readouterr().err
    assert not Path("new.log").exists()


# --- tuning ----------------------------------------------------------------------------------------------------------

TUNE = ["--n-trials", 2, "--n-evaluations", 2, "--n-startup-trials", 1, "--eval-episodes", 1, "--no-optim-plots", "--seed", 1]


@pytest.mark.parametrize(
    ("key", "sampler", "pruner"),
    [("cpql", "random", "none"), ("consistency_ac", "tpe", "halving"), ("cpql", "tpe", "median")],
)
def test_optimize(key, sampler, pruner, tmp_path):
    command = ["optimize", "--algo", key, "--env", "Pendulum-v1", "-n", 10, "-f", tmp_path, "--sampler", sampler]
    zoo(*command, "--pruner", pruner, *TUNE, "--optimization-log-path", tmp_path / "trials")
    assert len(list((tmp_path / key).glob("report_*.csv"))) == 1
    assert (tmp_path / "trials/trial_0/evaluations.npz").exists()
    (report,) = (tmp_path / key).glob("report_*.csv")
    assert "params_n_candidates" in report.read_text() and "params_n_eval_candidates" not in report.read_text()


@pytest.mark.parametrize("key", KEYS)
def test_optimize_offline(key, minari, tmp_path):
    command = ["train", "-optimize", "--algo", key, "--dataset", DATASET, "--pretrain-steps", 4, "-f", tmp_path]
    storage = ["--storage", "study.log", "--study-name", key]
    more = ["--n-trials", 1, "--optimization-log-path", "trials", "-params", "policy_kwargs:dict(normalize_images=False)"]
    zoo(*command, *TUNE, *storage, *more)
    steps = np.load("trials/trial_0/evaluations.npz")["timesteps"].tolist()
    best = load(key, "trials/trial_0/best_model.zip")
    # of the gradient; before the student stage, whose start the trial chooses, a planner can't act
    assert steps == [n for n in (2, 4) if key != "ractd" or n >= best.stage_ends()[1]]
    # the trial's policy_kwargs are merged with those given
    assert best.policy_kwargs.keys() >= {"normalize_images", "net_arch"}
    # what trials are evaluated with is sampled
    (report,) = (tmp_path / key).glob("report_*.csv")
    actor_critic = key in ONLINE
    assert ("params_n_eval_candidates" in report.read_text()) == actor_critic
    assert "params_n_candidates" not in report.read_text()
    # trial 0 is a trial
    command = ["train", "--algo", key, "--dataset", DATASET, "--pretrain-steps", 1, "-f", tmp_path, "--eval-freq", -1]
    zoo(*command, *storage, "--trial-id", 0)
    config = config_of(max(tmp_path.glob(f"{key}/Pendulum-v1_*"), key=lambda path: int(path.name.split("_")[-1])))
    assert "net_arch" in config["policy_kwargs"] and "max_grad_norm" in config


def test_a_trial_of_several_seeds_is_their_mean(tmp_path, capsys):
    import optuna

    command = ["optimize", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 6, "-f", tmp_path, "--sampler", "random"]
    command += [*TUNE, "--pruner", "none", "--n-trials", 2, "--seeds-per-trial", 3, "--study-name", "seeds", *TINY]
    for name, seed in (("one", 1), ("two", 2)):
        zoo(*command, "--storage", f"{name}.log", "--seed", seed)
    storages = [optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{n}.log")) for n in ("one", "two")]
    for trial in optuna.load_study(storage=storages[0], study_name="seeds").trials:
        returns = trial.user_attrs["returns"]
        assert len(set(returns)) == 3 and trial.value == pytest.approx(np.mean(returns))
        assert trial.user_attrs["standard_error"] == pytest.approx(np.std(returns, ddof=1) / 3**0.5)
        assert set(trial.intermediate_values) == {1, 2}  # of the first seed
    found = ["--storage", "one.log", "--study-name", "seeds", "--trial-id", 7]
    zoo("train", "--algo", "cpql", "--env", "Pendulum-v1", *found, status=1)
    assert "has 2 trials, numbered from 0, got 7" in capsys.readouterr().err


def test_evaluations_of_trials_spread_over_both_phases(minari, tmp_path):
    command = ["optimize", "--algo", "cpql", "--dataset", DATASET, "--pretrain-steps", 8, "-n", 4, "-f", tmp_path]
    zoo(*command, *TUNE, "--n-trials", 1, "--optimization-log-path", "trials", *TINY)
    # the second at the last environment step
    assert np.load("trials/trial_0/evaluations.npz")["timesteps"].tolist() == [6, 4]


def test_a_combination_that_can_not_be_is_one_trial_less(tmp_path):
    command = ["optimize", "--algo", "diffusion_ql", "--env", "Pendulum-v1", "-n", 4, "-f", tmp_path, "--sampler", "random"]
    zoo(*command, *TUNE, "--n-trials", 4, *TINY, "sampling_steps:5")
    (report,) = (tmp_path / "diffusion_ql").glob("report_*.csv")
    states = [line for line in report.read_text().splitlines()[1:]]
    assert len(states) == 4 and any("PRUNED" in line for line in states) and any("COMPLETE" in line for line in states)


def test_samples_are_valid_and_merged():
    import optuna
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    from sb3_consistency.zoo.exp_manager import Hyperparams

    for key, name in algorithm_names().items():
        sampler = optuna.samplers.RandomSampler(seed=0)
        studies = {offline: optuna.create_study(sampler=sampler) for offline in (False, True)}
        for offline, her in ((False, False), (False, True), (False, False), (True, False), (True, False)):
            trial = studies[offline].ask()
            trial.set_user_attr("offline", offline)
            sampled = HYPERPARAMS_SAMPLER[key](trial, 1, 1, {"using_her_replay_buffer": her, "her_kwargs": {}})
            assert HYPERPARAMS_CONVERTER[key](trial.params) == sampled
            assert her == ("replay_buffer_kwargs" in sampled)
            if "alpha" in sampled:  # of an actor-critic
                assert ("n_eval_candidates" in sampled, "n_candidates" in sampled) == (offline, not offline)
                # the default from scratch
                assert offline or 0 in trial.distributions["alpha"].choices
            if key in ("cpql", "consistency_ac"):  # from scratch nothing is cloned, nor are there several steps
                assert {"alpha", "bc_loss", "sampling_steps"} <= sampled.keys() if offline else "ent_coef" in sampled
                assert offline or not {"alpha", "bc_loss", "sampling_steps"} & sampled.keys()
            sampled.pop("replay_buffer_kwargs", None)
            sampled["policy_kwargs"]["net_arch"] = [8]
            getattr(sb3_consistency, name)("MlpPolicy", "Pendulum-v1", buffer_size=10, **sampled)
    merged = Hyperparams(policy_kwargs="dict(n_critics=3, net_arch=[1])").copy()
    merged.update({"policy_kwargs": {"net_arch": [2]}, "tau": 0.1})
    assert merged == {"policy_kwargs": {"n_critics": 3, "net_arch": [2]}, "tau": 0.1}


def test_two_workers_share_a_study_and_survive_a_kill(tmp_path):
    import optuna

    def worker(seed, n_trials, n_steps):
        command = [sys.executable, "-m", "sb3_consistency", "optimize", "--algo", "cpql", "--env", "Pendulum-v1"]
        options = {"-n": n_steps, "-f": f"w{seed}", "--seed": seed, "--max-total-trials": n_trials, "--n-evaluations": 1}
        options |= {"--eval-episodes": 1, "--storage": "study.log", "--study-name": "shared", "--pruner": "none"}
        options |= {"--num-threads": 1, "--n-startup-trials": 1}
        command += [str(part) for pair in options.items() for part in pair]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        out = open(tmp_path / f"{seed}.txt", "w")
        return subprocess.Popen([*command, "--no-optim-plots"], cwd=tmp_path, env=env, stdout=out, stderr=out)

    def trials():
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
        return optuna.load_study(storage=storage, study_name="shared").trials

    victim = worker(1, 4, 10**6)
    deadline = time.time() + 60
    while not _has_begun(trials):
        assert time.time() < deadline and victim.poll() is None, Path("1.txt").read_text()
        time.sleep(0.2)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    survivors = [worker(seed, 4, 10) for seed in (2, 3)]
    assert [process.wait(timeout=120) for process in survivors] == [0, 0], Path("2.txt").read_text()
    states = [trial.state.name for trial in trials()]
    assert states.count("RUNNING") == 1 and states.count("COMPLETE") >= 3
    assert all(list(Path(f"w{seed}/cpql").glob("report_*.csv")) for seed in (2, 3))


def _has_begun(trials):
    try:
        return any(trial.params for trial in trials())
    except (KeyError, OSError, ValueError):
        return False


# --- sharing ---------------------------------------------------------------------------------------------------------


class FakeHub:
    """Takes the place of the hub's client: repositories are folders."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, repo_id, **kwargs):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repo_id, local_dir):
        Path(local_dir).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def download(self, repo_id, filename):
        from huggingface_hub.errors import EntryNotFoundError

        if not (self.root / repo_id / filename).exists():
            raise EntryNotFoundError(filename)
        return str(self.root / repo_id / filename)


@pytest.mark.parametrize("name", [None, "my-model"])
def test_push_and_load_up_to_the_network(name, runs, tmp_path, monkeypatch):
    from rl_zoo3 import ALGOS, load_from_hub

    from sb3_consistency.zoo.workarounds import import_push_to_hub

    hub = FakeHub(tmp_path / "hub-server")
    push = import_push_to_hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    monkeypatch.setattr(load_from_hub, "load_from_hub", hub.download)
    repo = ["-name", name] if name else []
    command = ["--algo", "consistencyac", "--env", "Pendulum-v1", "-orga", "me", *repo]
    video = ["--no-render"] if name else ["-n", 5]
    zoo("push-to-hub", *command, "-f", runs, *video)
    pushed = hub.root / "me" / (name or "consistency_ac-Pendulum-v1")
    card = (pushed / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    # rl-zoo3 derives the key of the algorithm from this name
    assert metadata["model-index"][0]["name"].lower() in ALGOS
    assert "**ConsistencyAC** agent" in card and "'batch_size': 8" in card and "rl_zoo3.enjoy" not in card
    assert f"load-from-hub --algo consistency_ac --env Pendulum-v1 -orga me{f' -name {name}' if name else ''} -f logs/" in card
    assert (pushed / "replay.mp4").exists() == ("(replay.mp4)" in card) == (name is None)
    assert metadata["library_name"] == "stable-baselines3" and {"sb3-consistency", "ConsistencyAC"} <= set(metadata["tags"])
    assert "over 10 episodes with deterministic actions" in card and "Trained online, without a dataset." in card
    assert "(learning_curve.png)" in card and (pushed / "learning_curve.png").exists()
    # the command that trained it, with every option that it had
    assert "train --algo consistency_ac --env Pendulum-v1 -n 40 " in card and "--env-kwargs max_episode_steps:20" in card
    buffer_size = json.loads((pushed / "consistency_ac-Pendulum-v1" / "data").read_text())["buffer_size"]
    assert buffer_size == 1_000_000
    assert (pushed / "consistency_ac-Pendulum-v1.safetensors").exists() and not (pushed / "vec_normalize.safetensors").exists()
    zoo("load-from-hub", *command, "-f", "logs")
    zoo("enjoy", "--algo", "consistency_ac", "--env", "Pendulum-v1", "-f", "logs", "-n", 5, "--no-render")
    (saved,) = Path("logs").rglob("*.safetensors")
    assert type(sb3_consistency.load_safe(saved)).__name__ == "ConsistencyAC"


def test_the_hub_gets_statistics_and_models_that_execute_nothing(tmp_path, monkeypatch):
    from rl_zoo3 import load_from_hub

    from sb3_consistency.zoo.workarounds import import_push_to_hub

    hub, push = FakeHub(tmp_path / "hub-server"), import_push_to_hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    monkeypatch.setattr(load_from_hub, "load_from_hub", hub.download)
    command = ["--env", "Pendulum-v1", "-f", "logs"]
    options = [*command, "-n", 20, "--eval-freq", -1, "--env-kwargs", "g:9.0", "max_episode_steps:20"]
    for algo in ("cpql", "sac"):
        zoo("train", "--algo", algo, *options, "-params", "normalize:True", "buffer_size:50", "learning_starts:50")
        zoo("push-to-hub", "--algo", algo, *command, "-orga", "me", "--no-render")
    assert (hub.root / "me/sac-Pendulum-v1/vec_normalize.pkl").exists()
    pushed = hub.root / "me/cpql-Pendulum-v1"
    assert {path.name for path in pushed.iterdir() if path.suffix in (".pkl", ".safetensors", ".zip")} == {
        "cpql-Pendulum-v1.safetensors",
        "cpql-Pendulum-v1.zip",
        "vec_normalize.safetensors",
        "train_eval_metrics.zip",
    }
    # the card's lines, with the client that downloads replaced
    code = (pushed / "README.md").read_text().split("## Without running code")[1].split("```python")[1].split("```")[0]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    names = {}
    exec(code, names)
    model, env = names["model"], names["env"]
    assert type(model) is CPQL and not env.training and env.get_attr("g") == [9.0]
    trained = CPQL.load("logs/cpql/Pendulum-v1_1/Pendulum-v1.zip")
    observation = env.reset()
    np.testing.assert_array_equal(*(m.predict(observation, deterministic=True)[0] for m in (model, trained)))
    # an older push left a pickle in the repository
    (pushed / "vec_normalize.pkl").write_bytes(b"never unpickled")
    for algo in ("cpql", "sac"):
        zoo("load-from-hub", "--algo", algo, "--env", "Pendulum-v1", "-orga", "me", "-f", "fetched")
        zoo("enjoy", "--algo", algo, "--env", "Pendulum-v1", "-f", "fetched", "-n", 5, "--no-render")
    names = {path.name for path in Path("fetched").rglob("*") if path.suffix in (".pkl", ".safetensors")}
    assert names == {"vecnormalize.pkl", "vecnormalize.safetensors", "Pendulum-v1.safetensors"}
    assert not list(Path("fetched/cpql").rglob("*.pkl"))


def test_the_command_of_an_environment_with_a_namespace(tmp_path):
    from sb3_consistency.zoo.hub import _command

    (tmp_path / "mine-Reach-v0").mkdir()
    command = "python -m sb3_consistency train --algo cpql --env mine/Reach-v0 --seed 7"
    (tmp_path / "mine-Reach-v0/command.txt").write_text(command)
    assert _command(tmp_path, "cpql", "mine/Reach-v0", {}) == command


def test_card_of_an_offline_model(tmp_path, monkeypatch):
    from sb3_consistency.zoo.hub import use_our_card

    monkeypatch.chdir(tmp_path)
    module = SimpleNamespace(
        generate_model_card=lambda *args: "theirs",
        generate_metadata=lambda *args: {"tags": []},
        repo_id="me/cpql-Hopper-v5",
        model_name="cpql-Hopper-v5",
        log_path="logs",
    )
    use_our_card(module)
    upload = tmp_path / "hub" / "cpql-Hopper-v5"
    upload.mkdir(parents=True)
    (upload / "results.json").write_text(json.dumps({"n_eval_episodes": 5, "is_deterministic": True}))
    for phase, steps in (("pretrain", [5, 10]), ("", [100, 200, 300])):
        (tmp_path / "logs" / phase).mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / "logs" / phase / "evaluations.npz", timesteps=steps, results=np.ones((len(steps), 4)))
    hyperparams = {"dataset": ["a/x-v0", "b/x-v0"], "pretrain_steps": 10, "dataset_kwargs": {"top_fraction": 0.5}}
    card, _ = module.generate_model_card("cpql", "CPQL", "me", "Hopper-v5", 1.0, 0.1, hyperparams, {"g": 1})
    assert "train --algo cpql --dataset a/x-v0,b/x-v0 --pretrain-steps 10\n" in card and "{'g': 1}" in card
    assert "`a/x-v0`, `b/x-v0`, 10 gradient steps (with {'top_fraction': 0.5})" in card
    # Student's interval of five episodes: 2.776 * 0.1 / sqrt(4)
    assert "Mean return 1.00, 95 % interval [0.86, 1.14], over 5 episodes with deterministic actions" in card
    assert "(learning_curve.png)" in card and (upload / "learning_curve.png").stat().st_size > 5_000
    picture = np.uint8(255 * plt.imread(upload / "learning_curve.png")[..., :3])
    assert (picture == np.uint8([0xD5, 0x5E, 0x00])).all(axis=-1).any()  # CPQL's colour, as everywhere
    assert module.generate_model_card("sac", "SAC", "me", "Hopper-v5", 1.0, 0.1, {}, {}) == "theirs"


# --- the installed package -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_installed_wheel_trains_from_an_empty_directory(tmp_path):
    def run(*command, cwd):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", cwd=ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    # the other packages, which take minutes to install, are those of this interpreter
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "others.pth").write_text(str(Path(np.__file__).parents[1]))
    (tmp_path / "empty").mkdir()
    where = run(python, "-c", "import sb3_consistency; print(sb3_consistency.__file__)", cwd=tmp_path / "empty")
    assert where.startswith(str(tmp_path / "venv"))
    command = [tmp_path / "venv/bin/sb3-consistency", "train", "--algo", "cpql", "--env", "Pendulum-v1", "-n", 20, *TINY]
    out = run(*command, cwd=tmp_path / "empty")
    assert f"Loading hyperparameters from: {tmp_path / 'venv'}" in out
    assert (tmp_path / "empty/logs/cpql/Pendulum-v1_1/Pendulum-v1.zip").exists()
    for folder in ("hyperparams", "hyperparams/offline"):
        here, there = ({path.name for path in (root / folder).glob("*.yml")} for root in (ROOT, site / "sb3_consistency"))
        assert here and here == there
