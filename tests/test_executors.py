"""Where the runs of a benchmark take place: whatever dies, every run is in the records once, and comes to the same."""

import os
import random
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import psutil
import pytest

from sb3_consistency import record_dataset, swing_up
from sb3_consistency.__main__ import main
from sb3_consistency.benchmark.executors import Attempt, Settings, attempt, missing, run_jobs, shard_of
from sb3_consistency.benchmark.jobs import Job, Work
from sb3_consistency.benchmark.planner_suite import planner_jobs
from sb3_consistency.benchmark.records import Records

TINY = repr({"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "learning_starts": 5, "device": "cpu"})
DATA = "test/pendulum-v0"
WALK = Job("online", "CPQL", TINY, "tests.dying:DyingOnce-v0", 0, 0, 90, 2, 3)

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
CLUSTER = {"submitit": {"cluster": "local"}, "ray": {}, "local": {}}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers import the environments of the tests."""
    here = os.path.dirname(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def ray_cluster():
    """Two nodes of one processor each, on this machine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def weights(folder):
    return {(run["algo"], run["data"], run["seed"]): run["weights"] for run in Records(folder, "runs").read()}


@pytest.mark.parametrize("algo", ["CPQL", "SAC"])
def test_a_killed_run_goes_on_and_comes_to_the_same(algo, tmp_path, monkeypatch):
    job = replace(WALK, algo=algo, options=TINY if algo == "CPQL" else TINY.replace("'device': 'cpu'", "'verbose': 0"))
    assert run_jobs([job], tmp_path / "whole") == []
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    settings = Settings(checkpoint_every=20, retries=1)
    assert run_jobs([job], tmp_path / "killed", settings) == []
    assert (tmp_path / "died").exists()
    (whole,), (killed,) = (Records(tmp_path / name, "runs").read() for name in ("whole", "killed"))
    assert killed["weights"] == whole["weights"] and killed["curve"] == whole["curve"]
    assert len(whole["curve"]) == 3 and whole["curve"][-1]["return"] == whole["deterministic_return"]
    assert ("resumed" in killed) == (algo == "CPQL")  # SB3's own start anew
    assert not (tmp_path / "killed/checkpoints").exists()


def test_without_retries_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    folder, settings = tmp_path / "runs_of_mine", Settings(checkpoint_every=20)
    (failure,) = run_jobs([WALK], folder, settings)
    assert "exit code -9" in failure and missing([WALK], folder) == [WALK]
    assert run_jobs([WALK], folder, settings) == [] and missing([WALK], folder) == []
    assert Records(folder, "runs").read()[0]["resumed"]


class Interrupt:
    """Interrupts a run after a number of steps."""

    def __init__(self, n_steps):
        self.left = n_steps

    def __call__(self, n):
        self.left -= n
        if self.left == 0:
            raise KeyboardInterrupt


def test_what_was_evaluated_before_the_kill_is_not_lost_over_two_phases(minari_folder, tmp_path):
    record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)
    options = repr({"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "n_candidates": 2})
    job = Job("offline-to-online", "CPQL", options, DATA, 0, 130, 30, 1, 2)
    whole = attempt(job, Work(tmp_path / "whole", 1), {}).record
    killed = tmp_path / "killed"
    # in either phase; the second attempt goes on from step 64
    for n_steps in (70, 130 - 64 + 15):
        with pytest.raises(KeyboardInterrupt):
            attempt(job, Work(killed, 1, 10, Interrupt(n_steps)), {})
        assert list((killed / "checkpoints").rglob("manifest.json"))
    record = attempt(job, Work(killed, 1, 10), {}).record
    assert record["weights"] == whole["weights"] and record["curve"] == whole["curve"]
    assert [(p["phase"], p["step"]) for p in record["curve"]] == [
        ("offline", 65),
        ("offline", 130),
        ("online", 15),
        ("online", 30),
    ]


def test_shards_are_all_jobs_once_and_keep_students_with_their_teachers(tmp_path):
    jobs = [replace(WALK, seed=seed) for seed in range(10)]
    shards = [shard_of(jobs, f"{i}/4") for i in range(1, 5)]
    assert sorted((job for shard in shards for job in shard), key=lambda job: job.seed) == jobs
    teachers, students = planner_jobs([DATA], range(5), (1, 1, 1))
    for i in (1, 2):
        files = [{job.teacher_file for job in shard_of(part, f"{i}/2")} for part in (teachers, students)]
        assert files[0] == files[1]
    for wrong in ("0/4", "5/4", "4", "a/b", "1/0"):
        with pytest.raises(ValueError, match="--shard must be like 3/16"):
            shard_of(jobs, wrong)


def test_printed_commands_do_their_share(minari_folder, tmp_path, capsys):
    record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)
    command = [
        "benchmark",
        "offline",
        "--algos",
        "CPQL",
        "ConsistencyBC",
        "--datasets",
        DATA,
        "--steps",
        "4",
        "--episodes",
        "1",
    ]
    command += ["--evaluations", "1", "--options", "{'policy_kwargs': {'net_arch': [8]}}", "--folder", str(tmp_path / "out")]
    assert main([*command, "--print-commands", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("--shard 1/2") and "--print-commands" not in first
    assert not (tmp_path / "out").exists()
    for line, n in ((first, 1), (second, 2)):
        assert main(shlex.split(line)[3:]) == 0
        assert len(Records(tmp_path / "out", "runs").read()) == n


def test_data_that_a_worker_does_not_have_is_named_with_the_machine_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    outcome = attempt(replace(WALK, suite="offline", data="test/none-v0", offline_steps=5), Work(tmp_path, 1), {})
    assert isinstance(outcome, Attempt) and outcome.record is None and not outcome.died
    for part in ("test/none-v0", str(tmp_path / "elsewhere"), socket.gethostname()):
        assert part in outcome.error
    outcome = attempt(replace(WALK, suite="offline", data="mine.npz", offline_steps=5), Work(tmp_path, 1), {})
    assert "mine.npz" in outcome.error and os.getcwd() in outcome.error


def test_missing_libraries_name_the_extra(tmp_path, monkeypatch):
    for name, library in {"slurm": "submitit", "ray": "ray"}.items():
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=r"\.\[cluster\]"):
            run_jobs([WALK], tmp_path, Settings(name))


def settings_of(executor, ray_cluster=None, **more):
    if executor == "ray":
        return Settings("ray", 2, 1, address=ray_cluster.address, **more)
    return Settings("slurm" if executor == "submitit" else "local", 2, 1, options=CLUSTER[executor], **more)


@needs_submitit
def test_submitit_runs_jobs(tmp_path):
    bad = replace(WALK, algo="Nothing")
    (failure,) = run_jobs([WALK, bad], tmp_path, settings_of("submitit"))
    assert "'nothing'" in failure.lower()
    (run,) = Records(tmp_path, "runs").read()
    assert run["executor"] == "slurm" and run["seed"] == 0 and "Traceback" in (tmp_path / "failures.log").read_text()


@needs_ray
def test_ray_runs_jobs_on_two_nodes(ray_cluster, tmp_path):
    bad = replace(WALK, algo="Nothing")
    (failure,) = run_jobs([WALK, bad], tmp_path, settings_of("ray", ray_cluster))
    assert "'nothing'" in failure.lower()
    (run,) = Records(tmp_path, "runs").read()
    assert run["executor"] == "ray" and run["threads"] == 1


@pytest.mark.parametrize(("executor", "by"), [("submitit", "SIGKILL"), ("submitit", "SIGUSR2"), ("ray", "SIGKILL")])
def test_a_run_that_is_killed_or_pre_empted_on_a_cluster_comes_to_the_same(executor, by, request, tmp_path, monkeypatch):
    pytest.importorskip(executor)
    whole = attempt(WALK, Work(tmp_path / "whole", 1), {}).record
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    monkeypatch.setenv("DIES_BY", by)
    cluster = request.getfixturevalue("ray_cluster") if executor == "ray" else None
    # a pre-empted job is queued again by submitit itself
    settings = settings_of(executor, cluster, checkpoint_every=20, retries=int(by == "SIGKILL"))
    assert run_jobs([WALK], tmp_path / "killed", settings) == []
    (killed,) = Records(tmp_path / "killed", "runs").read()
    assert (tmp_path / "died").exists() and killed["resumed"]
    assert killed["weights"] == whole["weights"] and killed["curve"] == whole["curve"]


class Killer(threading.Thread):
    """Kills a worker at random, now and then: SIGKILL, or what a pre-emption sends."""

    def __init__(self, is_worker, signals, n_kills, every=4.0):
        super().__init__(daemon=True)
        self.is_worker, self.signals, self.left, self.every = is_worker, signals, n_kills, every
        self.killed, self.rng, self.over = [], random.Random(0), False

    def run(self):
        while self.left and not self.over:
            time.sleep(self.rng.uniform(0.5, 1.5) * self.every)
            found = []
            for process in psutil.process_iter():
                try:
                    # old enough to be at work
                    if self.is_worker(process) and time.time() - process.create_time() > 4:
                        found.append(process)
                except psutil.Error:
                    continue
            if found:
                victim, by = self.rng.choice(found), self.rng.choice(self.signals)
                victim.send_signal(by)
                self.killed.append((victim.pid, by))
                self.left -= 1


WORKERS = {
    "local": lambda p: p.ppid() == os.getpid() and "spawn_main" in " ".join(p.cmdline()),
    "submitit": lambda p: "submitit.core._submit" in " ".join(p.cmdline()),
    "ray": lambda p: p.name().startswith("ray::attempt") or "ray::attempt" in " ".join(p.cmdline()),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Twenty jobs, and the weights that they come to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)
    options = repr({"policy_kwargs": {"net_arch": [16]}, "batch_size": 16, "learning_starts": 5})
    jobs = [Job("offline", "CPQL", options, DATA, seed, 600, 0, 1, 3) for seed in range(10)]
    jobs += [Job("online", algo, options, "Pendulum-v1", seed, 0, 300, 1, 3) for algo in ("CPQL", "SAC") for seed in range(5)]
    began = time.monotonic()
    assert run_jobs(jobs, folder, Settings("local", 2)) == []
    print(f"undisturbed: {time.monotonic() - began:.0f} s")
    yield jobs, weights(folder)
    if before is None:
        del os.environ["MINARI_DATASETS_PATH"]
    else:
        os.environ["MINARI_DATASETS_PATH"] = before


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "submitit", "ray"])
def test_runs_whose_workers_are_killed_at_random(executor, request, undisturbed, tmp_path):
    """Twenty runs, each in the records once, with the weights of an undisturbed run."""
    if executor != "local":
        pytest.importorskip(executor)
    cluster = request.getfixturevalue("ray_cluster") if executor == "ray" else None
    jobs, expected = undisturbed
    preempted = [signal.SIGKILL, signal.SIGUSR2] if executor == "submitit" else [signal.SIGKILL, signal.SIGTERM]
    killer = Killer(WORKERS[executor], preempted, n_kills=12)
    killer.start()
    began = time.monotonic()
    assert run_jobs(jobs, tmp_path, settings_of(executor, cluster, retries=20, checkpoint_every=50)) == []
    killer.over = True
    runs = Records(tmp_path, "runs").read()
    resumed = sum("resumed" in run for run in runs)
    print(f"{executor}: {time.monotonic() - began:.0f} s, {len(killer.killed)} killed, {resumed} resumed")
    assert len(killer.killed) >= 5 and resumed
    assert len(runs) == len(jobs) == 20
    assert weights(tmp_path) == expected
    assert np.isfinite([run["deterministic_return"] for run in runs]).all()
