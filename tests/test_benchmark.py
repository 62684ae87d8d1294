"""The benchmark command: jobs, resuming, statistics, reports."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import psutil
import pytest
from stable_baselines3 import SAC
from torch import nn

from sb3_consistency import CPQL
from sb3_consistency.__main__ import main
from sb3_consistency.benchmark import scaling, speed
from sb3_consistency.benchmark.planner import planner_jobs
from sb3_consistency.benchmark.published import published_score
from sb3_consistency.benchmark.records import Records
from sb3_consistency.benchmark.report import aggregate, comparable, score_table, write_report
from sb3_consistency.benchmark.runs import Job, constructor_arguments, execute
from sb3_consistency.benchmark.speed_report import ratio_table
from sb3_consistency.benchmark.suites import DENOISING_STEPS, jobs_of, run_jobs
from sb3_consistency.offline.record import record_dataset, swing_up

TINY = repr({"policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "device": "cpu"})
DATA = "test/pendulum-v0"


@pytest.fixture
def dataset(minari_folder):
    return record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)


def job(**changes):
    return replace(Job("offline", "CPQL", TINY, DATA, 0, 12, 0, 2, 2), **changes)


def record(algo="CPQL", data="mujoco/hopper/medium-v0", seed=0, score=50.0, **more):
    curve = [{"phase": "offline", "step": n, "return": 30 * score, "score": score} for n in (5, 10)]
    scores = {"deterministic_score": score, "sampled_score": score, "behaviour_score": 40.0}
    returns = {key.replace("score", "return"): 30 * value for key, value in scores.items()}
    base = {"suite": "offline", "algo": algo, "options": "{}", "data": data, "seed": seed, "offline_steps": 10}
    base |= {"episodes": 10, "evaluations": 2}
    base |= {"online_steps": 0, "offline_seconds": 1.0, "acting_us": 200.0, "processes": 1, "threads": 1}
    return {**base, **scores, **returns, "curve": curve, "commit": "abc", "processor": "p", "torch": "2", **more}


def test_records_survive_a_torn_line(tmp_path):
    records = Records(tmp_path / "new", "runs")
    assert records.read() == []
    records.append({"a": 1})
    with records.path.open("a") as file:
        file.write('{"a": 2, "b"')  # the process was killed here
    assert records.read() == [{"a": 1}]
    records.append({"a": 3})
    assert records.read() == [{"a": 1}, {"a": 3}]


def test_jobs_of_one_seed_stay_together():
    jobs = jobs_of("offline", ["CPQL", "DiffusionQL"], ["d"], [0, 1], 10, 0)
    assert [(j.seed, j.algo) for j in jobs] == [(0, "CPQL"), (0, "DiffusionQL"), (1, "CPQL"), (1, "DiffusionQL")]


def test_denoising_jobs_set_the_number_of_steps():
    jobs = jobs_of("denoising", ["ConsistencyBC", "diffusion_bc"], ["d"], [0], 10, 0, "{'gamma': 0.9}")
    assert [j.options for j in jobs[: len(DENOISING_STEPS)]] == [
        repr({"gamma": 0.9, "sampling_steps": n}) for n in DENOISING_STEPS
    ]
    assert (jobs[-1].algo, jobs[-1].options) == ("DiffusionBC", repr({"gamma": 0.9, "diffusion_steps": 20}))
    with pytest.raises(ValueError, match="--algos"):
        jobs_of("denoising", ["SAC"], ["d"], [0], 10, 0)


@pytest.mark.parametrize(
    ("suite", "algo"),
    [("offline", "SAC"), ("online", "RACTD"), ("offline-to-online", "ConsistencyBC"), ("online", "nothing")],
)
def test_algorithms_that_a_suite_cannot_run_are_refused_at_once(suite, algo):
    with pytest.raises(ValueError, match="algo"):
        jobs_of(suite, [algo], ["d"], [0], 10, 10)


BAD_ACTIVATION = "{'policy_kwargs': {'activation_fn': 'relu'}}"


@pytest.mark.parametrize("options", ["{", "3", "open('x')", "{'seed': 1}", BAD_ACTIVATION])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match="--options"):
        jobs_of("offline", ["CPQL"], ["d"], [0], 10, 0, options)


def test_an_activation_is_named_in_the_options(dataset):
    options = TINY.replace("'net_arch'", "'activation_fn': 'ReLU', 'net_arch'")
    assert constructor_arguments(options)["policy_kwargs"] == {"net_arch": [8], "activation_fn": nn.ReLU}
    (named,) = jobs_of("offline", ["CPQL"], [DATA], [0], 12, 0, options, episodes=2)
    assert execute(named)["deterministic_return"] != execute(job())["deterministic_return"]


def test_a_run_is_repeatable_however_often_it_is_evaluated(dataset):
    often, once = execute(job(evaluations=4)), execute(job(evaluations=1))
    assert often["deterministic_return"] == once["deterministic_return"]
    assert often["sampled_return"] == once["sampled_return"]
    assert [point["step"] for point in often["curve"]] == [3, 6, 9, 12]
    assert often["curve"][-1]["return"] == often["deterministic_return"]
    assert often["behaviour_return"] == pytest.approx(np.mean([e.rewards.sum() for e in dataset]))
    assert execute(job(seed=1))["deterministic_return"] != once["deterministic_return"]


def test_offline_to_online_and_online_runs(dataset):
    phases = execute(job(suite="offline-to-online", online_steps=20))["curve"]
    assert [(p["phase"], p["step"]) for p in phases] == [("offline", 6), ("offline", 12), ("online", 10), ("online", 20)]
    sac = execute(job(suite="online", algo="SAC", options="{}", data="Pendulum-v1", offline_steps=0, online_steps=20))
    assert sac["behaviour_return"] is None and "deterministic_score" not in sac


def test_a_planner_is_evaluated_from_its_student_stage_on(dataset):
    points = execute(job(algo="RACTD", evaluations=6))["curve"]  # teacher 5 steps, reward model 1
    assert [point["step"] for point in points] == [6, 8, 10, 12]


def test_jobs_resume_and_failures_leave_the_others_alone(dataset, tmp_path):
    good, bad = job(), job(algo="Nothing")
    threads = os.environ.get("OMP_NUM_THREADS")
    assert "Nothing" in run_jobs([bad, good], tmp_path, n_processes=2)[0]
    assert os.environ.get("OMP_NUM_THREADS") == threads
    (done,) = Records(tmp_path, "runs").read()
    assert done["algo"] == "CPQL" and done["threads"] == 1 and done["processes"] == 2
    assert run_jobs([good], tmp_path) == []
    assert len(Records(tmp_path, "runs").read()) == 1


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_workers_stop_with_their_benchmark(dataset, tmp_path, by):
    command = [sys.executable, "-m", "sb3_consistency", "benchmark", "offline", "--algos", "CPQL", "--datasets", DATA]
    options = ["--options", TINY, "--steps", "1000000", "--evaluations", "1", "--seeds", "0", "1", "--folder", str(tmp_path)]
    # a shell's background jobs, and what they start, ignore Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL, preexec_fn=heed)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while not (workers := [p for p in parent.children() if p.cpu_times().user > 4]):  # imports take 2 seconds of it
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for one in [process, *(workers if by == signal.SIGINT else [])]:  # a terminal interrupts them all
        one.send_signal(by)
    process.wait(timeout=30)
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_interquartile_mean_and_its_interval():
    runs = [record(seed=i, score=float(s)) for i, s in enumerate([0, 10, 20, 100])]
    mean, low, high = aggregate(runs)
    assert mean == 15 and 0 <= low < mean < high <= 100
    constant = aggregate([record(seed=i, score=5.0) for i in range(3)])
    assert constant == (5, 5, 5)
    assert np.isnan(aggregate([record()])[1])


def test_bootstrap_is_stratified_by_dataset():
    """Datasets with very different scores: resampling within each leaves the mean where it is."""
    runs = [record(data=data, seed=i, score=s + i) for data, s in {"a": 0.0, "b": 100.0}.items() for i in range(3)]
    mean, low, high = aggregate(runs)
    assert mean == pytest.approx(51) and high - low < 5


def test_published_scores_are_marked_as_theirs():
    assert published_score("DiffusionQL", "mujoco/hopper/medium-v0") == 90.5
    assert published_score("DiffusionQL", "zoo/hopper/medium-v0") is None
    table = score_table([record("DiffusionQL", seed=i, score=s) for i, s in enumerate([40.0, 60.0])])
    assert "theirs" in table and "90.5" in table and "50.0 ± 14.1" in table


def test_report_holds_every_suite(tmp_path):
    records = Records(tmp_path, "runs")
    for seed in (0, 1):
        for algo in ("CPQL", "DiffusionQL"):
            records.append(record(algo, seed=seed, score=50.0 + seed))
    for algo, name in {"ConsistencyBC": "sampling_steps", "DiffusionBC": "diffusion_steps"}.items():
        for n in (1, 2):
            records.append(record(algo, suite="denoising", options=repr({name: n})))
    text = write_report(tmp_path).read_text()
    assert "## Offline" in text and "## Number of denoising steps" in text
    pngs = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pngs == [
        "denoising_10_2_10.png",
        "denoising_10_2_10_mujoco_hopper_medium-v0.png",
        "offline_10_2_10_aggregate.png",
        "offline_10_2_10_mujoco_hopper_medium-v0.png",
    ]
    assert all(name in text for name in pngs)
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 8


def test_runs_of_different_length_are_no_seeds_of_each_other(tmp_path):
    records = Records(tmp_path, "runs")
    records.append(record(score=10.0))
    records.append(record(score=80.0, offline_steps=1000, evaluations=3))
    text = write_report(tmp_path).read_text()
    assert "10.0" in text and "80.0" in text and "45.0" not in text


def test_means_over_datasets_need_the_same_datasets():
    one, other = record("CPQL", data="a"), record("DiffusionQL", data="a")
    assert not comparable([one, other])  # a mean of one
    assert comparable([one, record("CPQL", data="a", seed=1), other])
    assert not comparable([one, record("CPQL", data="b"), other])
    returns = [{k: v for k, v in record(data=d).items() if not k.endswith("score")} for d in "ab"]
    assert not comparable(returns)


def test_report_of_an_empty_folder(tmp_path, capsys):
    assert main(["benchmark", "report", "--folder", str(tmp_path)]) == 1
    assert "no benchmark records" in capsys.readouterr().err


def test_times_of_runs_that_shared_the_machine_are_left_out(tmp_path):
    Records(tmp_path, "runs").append(record(processes=2))
    assert "ms per step" not in write_report(tmp_path).read_text()


def test_ratios_refer_to_the_run_without_candidates():
    rows = [
        {"system": "SAC", "candidates": None, "median_us": 100.0, "p95_us": 110.0},
        {"system": "CPQL", "candidates": 1, "median_us": 50.0, "p95_us": 60.0},
        {"system": "CPQL", "candidates": 50, "median_us": 400.0, "p95_us": 500.0},
        {"system": "DiffusionQL (T = 5)", "candidates": 50, "median_us": 9000.0, "p95_us": 9000.0},
        {"system": "DiffusionQL (T = 5)", "candidates": 1, "median_us": 500.0, "p95_us": 600.0},
    ]
    lines = ratio_table(pd.DataFrame(rows)).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["CPQL"] == ["50", "60", "2.00", "10.00"]
    assert cells["CPQL, 50 candidates"] == ["400", "500", "0.25", "1.25"]


@pytest.fixture
def few_systems(monkeypatch):
    options = {"policy_kwargs": {"net_arch": [8]}}
    chosen = [speed.System("SAC", "SAC", options), speed.System("CPQL", "CPQL", options)]
    monkeypatch.setattr(speed, "systems", lambda: chosen)
    monkeypatch.setattr(speed, "TURN", 0.01)


def test_speed_refuses_a_loaded_machine(few_systems, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "busy", lambda: 93.0)
    command = ["benchmark", "speed", "--quick", "--rounds", "1", "--folder", str(tmp_path)]
    assert main(command) == 1
    assert "93 % busy" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert "loaded machine" in (tmp_path / "README.md").read_text()


def test_speed_measures_training_and_acting(few_systems, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "busy", lambda: 0.0)
    records = Records(tmp_path, "speed")
    speed.measure(records, rounds=2)
    rows = [row for row in records.read() if row["threads"] == 1]
    assert len([row for row in rows if row["what"] == "gradient step"]) == 2
    acting = {(row["system"], row["what"], row["batch"], row["candidates"]) for row in rows if row["what"] != "gradient step"}
    expected = {("SAC", w, b, None) for w in ("predict", "sampler") for b in (1, 256)}
    assert acting == expected | {("CPQL", w, b, n) for w in ("predict", "sampler") for b in (1, 256) for n in (1, 50)}
    assert all(0 < row["median_us"] <= row["p95_us"] for row in rows)
    text = write_report(tmp_path).read_text()
    assert "loaded machine" not in text and "speed_cpu_1.png" in text


def test_planners_share_a_teacher_and_resume(tmp_path, dataset):
    folder = tmp_path / "out"
    options = repr({"horizon": 4, "policy_kwargs": {"net_arch": [8], "model_kwargs": {"n_levels": 5}}})
    students = ["{'reward_weight': 0.0}", "{'reward_weight': 5.0}"]
    command = ["benchmark", "planner", "--datasets", DATA, "--steps", "6", "2", "4", "--episodes", "2"]
    command += ["--options", options, "--folder", str(folder), "--students"]
    assert main([*command, students[0]]) == 0
    teacher_file = next(folder.glob("teacher_*.zip"))
    written = teacher_file.stat().st_mtime_ns
    assert main([*command, *students]) == 0
    runs = Records(folder, "runs").read()
    assert [(run["student"], run["offline_steps"]) for run in runs] == [("", 6), *((student, 6) for student in students)]
    assert [[p["passes"] for p in run["planners"]] for run in runs] == [[8, 20], [1, 2, 4], [1, 2, 4]]
    assert runs[1]["planners"][0]["deterministic"] != runs[2]["planners"][0]["deterministic"]
    text = (folder / "README.md").read_text()
    assert "teacher, 6 steps `'horizon': 4" in text and "student `'reward_weight': 5.0`, 4 steps" in text
    teachers, _ = planner_jobs([DATA], [0], (6, 2, 4), students, options, 2)
    assert teachers[0].has_files(folder) and teacher_file.stat().st_mtime_ns == written
    teacher_file.unlink()
    assert not teachers[0].has_files(folder)  # so it runs again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--students", "5"], "--students must be the text of a dict of plain values, got '5'"),
        (["--options", "[]"], "--options must be the text of a dict of plain values, got '[]'"),
        (["--options", "{'seed': 1}"], "--options: seed is given by --seeds"),
        (["--students", "{'reward_steps': 1}"], "--students: reward_steps is given by --steps"),
        (["--steps", "1", "0", "1"], "--steps must be at least 1 each, got 1 0 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_bad_planner_arguments(arguments, message, tmp_path, capsys):
    assert main(["benchmark", "planner", "--datasets", DATA, "--folder", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_scaling_measures_every_size_and_the_memory_of_a_dataset(monkeypatch, tmp_path):
    small = {"policy_kwargs": {"net_arch": [8]}}
    chosen = [
        scaling.Point("batch size", n, speed.System(algo, algo, {**small, "batch_size": n}))
        for algo in ("SAC", "CPQL")
        for n in (16, 512)
    ]
    chosen.append(scaling.Point("environments (predict)", 4, speed.System("CPQL", "CPQL", small)))
    monkeypatch.setattr(scaling, "points", lambda quick: chosen)
    trained, turn = set(), scaling.training_turn

    def noted_turn(model, n_steps):
        trained.add((type(model), model.batch_size))
        return turn(model, n_steps)

    monkeypatch.setattr(scaling, "training_turn", noted_turn)
    assert main(["benchmark", "scaling", "--quick", "--force", "--rounds", "2", "--folder", str(tmp_path)]) == 0
    rows = Records(tmp_path, "scaling").read()
    times = {(r["axis"], r["system"], r["value"]): r["median_us"] for r in rows if r["axis"] != "memory"}
    assert set(times) == {(p.axis, p.system.label, p.value) for p in chosen}
    assert all(median > 0 for median in times.values())
    # which of them is longer is the machine's business, not a test's
    assert trained == {(algo, n) for algo in (SAC, CPQL) for n in (16, 512)}
    (memory,) = [r for r in rows if r["axis"] == "memory"]
    # observations twice, actions, reward, done, timeout, 4 bytes each
    assert memory["value"] == 100_000 and memory["buffer_bytes"] == 100_000 * 4 * (17 + 17 + 6 + 3)
    # a little may fit into what was freed before
    assert 0.5 * memory["buffer_bytes"] <= memory["extra_bytes"] < 100e6
    text = (tmp_path / "README.md").read_text()
    assert "Milliseconds against batch size" in text and "100,000" in text
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_the_scaling_suite_varies_one_size_at_a_time():
    for axis, option in {"batch size": "batch_size", "denoising steps": "sampling_steps"}.items():
        options = [p.system.options for p in scaling.points() if p.axis == axis and p.system.algo == "CPQL"]
        assert len({o[option] for o in options}) == len(options) > 3
        assert len({str({k: v for k, v in o.items() if k != option}) for o in options}) == 1


def test_quick_suite_from_the_command_line(minari_folder, tmp_path, capsys):
    command = ["benchmark", "offline", "--quick", "--steps", "10", "--episodes", "1", "--evaluations", "1"]
    assert main([*command, "--algos", "CPQL", "--options", TINY, "--folder", str(tmp_path)]) == 0
    assert "Report: " in capsys.readouterr().out
    (run,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert run["data"] == "sb3-consistency/pendulum/mixed-v0" and run["gymnasium"] and run["minari"]
