"""The examples and the command line run."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC

from sb3_consistency import CPQL
from sb3_consistency.__main__ import main
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.data.record import record_dataset
from tests.conftest import SMALL

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name, *args, cwd):
    env = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(cwd / "minari")}
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout


def test_quickstart(tmp_path):
    out = run_example("01_quickstart.py", "--steps", 200, "--folder", tmp_path / "out", cwd=tmp_path)
    assert "| behaviour in the data |" in out and "acting without PyTorch: mean return" in out
    folder = tmp_path / "out"
    assert (folder / "learning_curve.png").stat().st_size > 10_000
    # whoever redirects the output sees the same lines in the file, as they come
    told = [line for line in out.splitlines() if "step" in line and " s  " in line]
    assert len(told) > 10 and set(told) <= set((folder / "log.txt").read_text().splitlines())
    # what it made is what its last lines say to use
    model = CPQL.load(folder / "model")
    assert model.load_dataset(str(folder / "data.npz")) == 800


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help_shows_the_defaults(name, tmp_path):
    out = run_example(name, "--help", cwd=tmp_path)
    assert "(default: " in out and all("(default: " in " ".join(text.split()) for text in out.split("\n  --")[1:])


def test_multimodality(tmp_path):
    algos = ["ConsistencyBC", "ConsistencyAC", "CPQL", "CPQL-ict", "CPQL-distill", "DiffusionBC", "DiffusionQL"]
    out = run_example("02_multimodality.py", "--steps", 50, "--algos", *algos, cwd=tmp_path)
    assert "data: 8 of 8 modes" in out
    for algo in algos:
        name, found = next(line for line in out.splitlines() if line.startswith(f"{algo}, ")).split(": ", 1)
        assert name.endswith("1 pass" if algo.startswith(("ConsistencyBC", "CPQL")) else "passes")
        assert 0 <= float(found.split(", ")[1].split(" %")[0]) < 100
    assert (tmp_path / "multimodality.png").stat().st_size > 10_000


@pytest.mark.slow
def test_multimodality_of_the_default_loss(tmp_path):
    out = run_example("02_multimodality.py", cwd=tmp_path)
    modes, share = next(line for line in out.splitlines() if "ConsistencyBC" in line).split(": ")[1].split(" of 8 modes, ")
    assert int(modes) >= 7 and float(share.split(" %")[0]) >= 90
    assert float(out.split("Gaussian policy: ")[1].split(", ")[1].split(" %")[0]) < 60


def one_pass_with_critics(*args, cwd):
    """Modes, percent of the samples near one and near a good one, number of the mode next to the deterministic action."""
    out = run_example("02_multimodality.py", "--algos", "CPQL-distill", *args, cwd=cwd)
    found = next(line for line in out.splitlines() if line.startswith("CPQL-distill, 1 pass")).split(": ", 1)[1]
    return [*(float(part.split()[0]) for part in found.split(", ")), int(found.split("from mode ")[1])]


@pytest.mark.slow
def test_one_pass_with_critics_keeps_equally_good_modes(tmp_path):
    modes, near, good, _ = one_pass_with_critics(cwd=tmp_path)
    assert modes >= 7 and near >= 90 and 35 < good < 65


@pytest.mark.slow
def test_one_pass_with_critics_goes_to_the_better_modes_and_keeps_them_apart(tmp_path):
    narrow = "{'policy_kwargs': {'net_arch': [96, 96, 96]}}"
    modes, near, good, nearest = one_pass_with_critics("--bonus", 1, "--steps", 2500, "--options", narrow, cwd=tmp_path)
    assert modes >= 4 and near >= 90 and good >= 90 and nearest % 2 == 0


def test_planner_modes(tmp_path):
    out = run_example("04_planner_modes.py", "--steps", 30, "--students", "{'reward_support': 0.0}", cwd=tmp_path)
    assert "RACTD, 1 pass: " in out and "{'reward_support': 0.0}: " in out and "data: " in out
    assert (tmp_path / "planner_modes.png").stat().st_size > 10_000


def test_maze(tmp_path, minari_folder):
    gym.register_envs(pytest.importorskip("gymnasium_robotics", reason="needs the extra mujoco"))
    env = gym.make("PointMaze_UMaze-v3", continuing_task=True, reset_target=True, max_episode_steps=50)
    record_dataset("test/maze-v0", env, lambda obs: env.action_space.sample(), 100)
    options = {"--dataset": "test/maze-v0", "--horizon": 8, "--steps": 30, "--walk": 20}
    out = run_example("05_maze.py", *(x for option in options.items() for x in option), cwd=tmp_path)
    assert "- controller of the data: " in out and "- student, 1 pass: " in out
    assert (tmp_path / "maze.png").stat().st_size > 10_000


@pytest.mark.parametrize(("algo", "cls"), [("sac", SAC), ("cpql", CPQL)])
def test_record_command(algo, cls, minari_folder, tmp_path, capsys):
    options = {"policy_kwargs": {"net_arch": [8]}} if cls is SAC else SMALL
    cls("MlpPolicy", "Pendulum-v1", buffer_size=300, **options).save(tmp_path / "model")
    command = ["record", "--algo", algo, "--model", str(tmp_path / "model"), "--env", "Pendulum-v1"]
    assert main([*command, "--dataset-id", "test/recorded-v0", "-n", "250", "--noise", "0.1"]) == 0
    assert "250 steps, 2 episodes" in capsys.readouterr().out
    source = open_dataset("test/recorded-v0")
    assert source.lengths.tolist() == [200, 50]
    space = gym.make("Pendulum-v1").action_space
    assert all(space.contains(action) for episode in source.episodes([0, 1]) for action in episode.actions)
    assert main([*command, "--dataset-id", "test/recorded-v0", "-n", "10"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["record", "--algo", "nothing", *command[3:], "--dataset-id", "test/x-v0"]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--dataset-id", "test/no-version"], "no Minari id"),
        (["--dataset-id", "bad id"], "no Minari id"),
        (["-n", "0"], "n_steps must be at least 1"),
        (["-n", "-5"], "n_steps must be at least 1"),
        (["--noise", "-1"], "noise must be at least 0, got -1.0"),
        (["--env", "Nope-v1"], "Nope"),
        (["--algo", "sac"], "damaged, or not a file of SAC.save()"),
        (["--vec-normalize", "model.zip"], "--vec-normalize: model.zip"),
        (["--vec-normalize", "missing.pkl"], "No such file"),
    ],
)
def test_record_command_refuses_before_it_records(changed, message, minari_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CPQL("MlpPolicy", "Pendulum-v1", **SMALL).save("model")
    command = ["record", "--algo", "cpql", "--model", "model", "--env", "Pendulum-v1", "--dataset-id", "test/x-v0", "-n", "10"]
    assert main([*command, *changed]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and not list(tmp_path.glob("minari/**/data"))


def test_from_dataset_recovers_a_recorded_environment(minari_folder):
    record_dataset("test/p-v0", "Pendulum-v1", lambda obs: np.zeros(1, np.float32), 220)
    model = CPQL.from_dataset("test/p-v0", **SMALL)
    assert model.env.envs[0].spec.id == "Pendulum-v1"
    model.pretrain(3)
    model.learn(10)
