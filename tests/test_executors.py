"""Where the runs of a benchmark take place: whatever dies, every run is in the records once, and comes to the same."""

import argparse
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest

from sb3_consistency import record_dataset, swing_up
from sb3_consistency.__main__ import main
from sb3_consistency.benchmark.command import _stages, add_parser
from sb3_consistency.benchmark.executors import Attempt, Settings, attempt, missing, run_jobs, shard_of
from sb3_consistency.benchmark.jobs import Job, Work
from sb3_consistency.benchmark.planner_suite import planner_jobs
from sb3_consistency.benchmark.records import Records
from tests import slurm

TINY = repr({"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "learning_starts": 5, "device": "cpu"})
DATA = "test/pendulum-v0"
WALK = Job("online", "CPQL", TINY, "tests.dying:DyingOnce-v0", 0, 0, 90, 2, 3)


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


@pytest.fixture
def slurm_cluster(monkeypatch):
    """One node, which is this machine."""
    if not slurm.programs():
        pytest.skip("Slurm is not installed")
    with slurm.cluster() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield


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


def test_a_killed_planner_goes_on(minari_folder, tmp_path):
    record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)
    options = repr({"horizon": 4, "policy_kwargs": {"net_arch": [8], "model_kwargs": {"n_levels": 5}}})
    (teacher,), (student,) = planner_jobs([DATA], [0], (130, 20, 110), ["{}"], options, 1)
    for job in (teacher, student):
        whole = attempt(job, Work(tmp_path / "whole", 1), {}).record
        with pytest.raises(KeyboardInterrupt):
            attempt(job, Work(tmp_path / "killed", 1, 10, Interrupt(100)), {})
        steps = []
        record = attempt(job, Work(tmp_path / "killed", 1, 10, steps.append), {}).record
        assert sum(steps) == 130 - 64
        returns = [[{k: p[k] for k in ("deterministic", "sampled")} for p in r["planners"]] for r in (whole, record)]
        assert returns[0] == returns[1]
    assert [file.suffixes for file in (tmp_path / "killed").glob("teacher*")] == [[".zip"]]


def test_shards_are_all_jobs_once_and_keep_students_with_their_teachers(tmp_path):
    jobs = [replace(WALK, seed=seed) for seed in range(10)]
    shards = [shard_of(jobs, f"{i}/4") for i in range(1, 5)]
    assert sorted((job for shard in shards for job in shard), key=lambda job: job.seed) == jobs
    teachers, students = planner_jobs([DATA], range(5), (1, 1, 1))
    for i in (1, 2):
        files = [{job.teacher_file for job in shard_of(part, f"{i}/2")} for part in (teachers, students)]
        assert files[0] == files[1]
        # whichever teachers there are by now
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        command = ["benchmark", "planner", "--datasets", "a", "b", "c", "--folder", str(tmp_path), "--shard", f"{i}/2"]
        stages = _stages(parser.parse_args(command))
        teachers_here = next(stages)
        for job in teachers_here:
            (tmp_path / job.teacher_file).touch()
        assert {job.teacher_file for job in next(stages)} == {job.teacher_file for job in teachers_here} != set()
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


def cluster_settings(executor, request, **more):
    """Two jobs at a time, of a thread each, on whatever the executor needs."""
    if executor == "ray":
        return Settings("ray", 2, 1, address=request.getfixturevalue("ray_cluster").address, **more)
    if executor == "local":
        return Settings("local", 2, 1, **more)
    pytest.importorskip("submitit")
    if executor == "slurm":
        request.getfixturevalue("slurm_cluster")
    return Settings("slurm", 2, 1, options={"cluster": "local"} if executor == "submitit" else {}, **more)


on_every_cluster = pytest.mark.parametrize("executor", ["submitit", "ray", pytest.param("slurm", marks=pytest.mark.slow)])


@on_every_cluster
def test_a_cluster_runs_jobs_and_tells_what_failed(executor, request, tmp_path):
    settings, bad = cluster_settings(executor, request), replace(WALK, algo="Nothing")
    (failure,) = run_jobs([WALK, bad], tmp_path, settings)
    assert "'nothing'" in failure.lower() and "Traceback" in (tmp_path / "failures.log").read_text()
    (run,) = Records(tmp_path, "runs").read()
    assert run["executor"] == settings.executor and run["seed"] == 0 and run["threads"] == 1


@on_every_cluster
@pytest.mark.parametrize("by", ["SIGKILL", "SIGUSR2"])
def test_a_run_that_is_killed_or_pre_empted_on_a_cluster_comes_to_the_same(executor, by, request, tmp_path, monkeypatch):
    if executor == "ray" and by == "SIGUSR2":
        pytest.skip("the signal is submitit's")
    whole = attempt(WALK, Work(tmp_path / "whole", 1), {}).record
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    monkeypatch.setenv("DIES_BY", by)
    # a pre-empted job is queued again by submitit itself
    settings = cluster_settings(executor, request, checkpoint_every=20, retries=int(by == "SIGKILL"))
    assert run_jobs([WALK], tmp_path / "killed", settings) == []
    (killed,) = Records(tmp_path / "killed", "runs").read()
    assert (tmp_path / "died").exists() and killed["resumed"]
    assert killed["weights"] == whole["weights"] and killed["curve"] == whole["curve"]


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["pre-empted", "requeued", "out of time"])
def test_a_suite_on_slurm_whose_jobs_are_queued_again(reason, slurm_cluster, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    job = replace(WALK, online_steps=300, episodes=1, evaluations=2)
    whole = {(job.algo, job.data, seed): attempt(replace(job, seed=seed), Work(tmp_path, 1), {}).record for seed in (0, 1)}
    command = ["benchmark", "online", "--envs", job.data, "--algos", "CPQL", "--seeds", "0", "1", "--episodes", "1"]
    command += ["--online-steps", "300", "--options", TINY, "--evaluations", "2", "--checkpoint-every", "20"]

    def upset():
        while len(list(tmp_path.glob("out/checkpoints/*/*/manifest.json"))) < 2:
            time.sleep(0.2)
        if reason == "pre-empted":
            slurm_says(
                "sbatch", "--partition=urgent", "--output=/dev/null", f"--cpus-per-task={os.cpu_count()}", "--wrap=sleep 1"
            )
        elif reason == "requeued":
            slurm_says("scontrol", "requeue", slurm_says("squeue", "--noheader", "--format=%F").split()[0])

    # Slurm looks at the time twice a minute, and tells a job up to a minute before it is over
    options = {"timeout_min": 2, "slurm_signal_delay_s": 10}
    monkeypatch.setenv("STEP_SECONDS", "0.4" if reason == "out of time" else "0.05")
    threading.Thread(target=upset, daemon=True).start()
    command += ["--executor", "slurm", "--executor-options", repr(options if reason == "out of time" else {})]
    assert main([*command, "--folder", str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == {key: record["weights"] for key, record in whole.items()}
    runs = Records(tmp_path / "out", "runs").read()
    assert len(runs) == 2 and all(run["resumed"] and run["executor"] == "slurm" for run in runs)
    print(slurm_says("sacct", "--duplicates", "--format=JobID%20,Partition,State,Elapsed"))


def slurm_says(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Killer(threading.Thread):
    """
    Sends workers SIGKILL, or what a pre-emption sends: one at random, then all of them as a run has a checkpoint, and so on.
    """

    def __init__(self, executor, signals, n_times, folder):
        super().__init__(daemon=True)
        self.executor, self.signals, self.left, self.folder = executor, signals, n_times, folder
        self.killed, self.rng, self.over = [], random.Random(0), False

    def run(self):
        before = {}
        while self.left and not self.over:
            # seconds of work since the last one, on a busy machine too: a run takes some 3 to begin, and some 2 to train
            age, workers = self.rng.uniform(1.5, 5.0), self.workers()
            victims = [one for one, work in workers.items() if work - before.get(one, 0) > age]
            if self.left % 2 == 0:
                victims = self.rng.sample(victims, min(1, len(victims)))
            elif not any(self.folder.glob("checkpoints/*/*/manifest.json")):
                victims = []
            else:
                victims = list(workers)
            for victim in victims:
                with suppress(psutil.Error):
                    by = self.signals[len(self.killed) % len(self.signals)]
                    victim.send_signal(by)
                    self.killed.append(by.name)
            if victims:
                before, self.left = workers, self.left - 1
            time.sleep(0.5)

    def workers(self):
        """Workers, and the processor time that they took."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() != "srun" and is_worker(process, self.executor, self.folder):
                    found[process] = sum(process.cpu_times()[:2])
        return found


def is_worker(process, executor, folder):
    """Whether a process runs a job of the folder; not those of another session of the tests."""
    line = process.cmdline()
    if executor in ("submitit", "slurm"):
        return "submitit.core._submit" in line and str(folder / "submitit") in line
    name = "spawn_main" if executor == "local" else "ray::attempt"
    return name in " ".join(line) and os.getpid() in [parent.pid for parent in process.parents()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Twenty jobs, and the weights that they come to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)
        options = TINY.replace(", 'device': 'cpu'", "")
        offline = Job("offline", "CPQL", options, DATA, 0, 400, 0, 1, 1)
        jobs = [replace(offline, seed=seed) for seed in range(10)]
        jobs += [
            replace(WALK, algo=algo, options=options, seed=seed, online_steps=300)
            for algo in ("CPQL", "SAC")
            for seed in range(5)
        ]
        assert [attempt(job, Work(folder, 1), {}).error for job in jobs] == [""] * len(jobs)
        yield jobs, weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "submitit", "ray", "slurm"])
def test_runs_whose_workers_are_killed_at_random(executor, request, undisturbed, tmp_path):
    """Twenty runs, each in the records once, with the weights of an undisturbed run."""
    settings = cluster_settings(executor, request, retries=20, checkpoint_every=50)
    jobs, expected = undisturbed
    # submitit's jobs go on at SIGTERM, and are queued again at SIGUSR2
    signals = [signal.SIGKILL, signal.SIGTERM if executor in ("local", "ray") else signal.SIGUSR2]
    killer = Killer(executor, signals, 6, tmp_path)
    killer.start()
    began = time.monotonic()
    assert run_jobs(jobs, tmp_path, settings) == []
    killer.over = True
    runs = Records(tmp_path, "runs").read()
    resumed = sum("resumed" in run for run in runs)
    print(f"{executor}: {time.monotonic() - began:.0f} s, {Counter(killer.killed)}, {resumed} resumed")
    assert set(killer.killed) == {by.name for by in signals} and len(killer.killed) >= 5 and resumed
    assert len(runs) == len(jobs) == 20
    assert weights(tmp_path) == expected
    assert np.isfinite([run["deterministic_return"] for run in runs]).all()
