"""The benchmark command: jobs, resuming, measuring."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from stable_baselines3 import SAC
from torch import nn

from sb3_consistency import CPQL, record_dataset, swing_up
from sb3_consistency.__main__ import main
from sb3_consistency.benchmark import load, scaling, speed
from sb3_consistency.benchmark.executors import Settings, run_jobs
from sb3_consistency.benchmark.jobs import Job, Work
from sb3_consistency.benchmark.planner_suite import planner_jobs, planner_section
from sb3_consistency.benchmark.records import Records
from sb3_consistency.benchmark.report import read_rows
from sb3_consistency.benchmark.runs import constructor_arguments
from sb3_consistency.benchmark.suites import DENOISING_STEPS, jobs_of

TINY = repr({"policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "device": "cpu"})
DATA = "test/pendulum-v0"


@pytest.fixture
def dataset(minari_folder):
    return record_dataset(DATA, "Pendulum-v1", swing_up(1.0, 0), 400)


def execute(job, **work):
    return job.run(Work(Path("unused"), **work))


def job(**changes):
    return replace(Job("offline", "CPQL", TINY, DATA, 0, 12, 0, 2, 2), **changes)


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    records = Records(tmp_path / "new", "runs")
    assert records.read() == []
    records.write("one", {"a": 1})
    records.write("two", {"a": 2})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: 1 / 0)  # killed before it was on the disk
        with pytest.raises(ZeroDivisionError):
            records.write("one", {"a": 3})
    assert records.read() == [{"a": 1}, {"a": 2}]
    records.write("one", {"a": 3})
    assert records.read() == [{"a": 3}, {"a": 2}]


def test_a_job_with_a_long_name_has_a_record(tmp_path, monkeypatch):
    assert job().key == "CPQL_test_pendulum-v0_0_3aeb2cd3dadc"
    monkeypatch.setattr(socket, "gethostname", lambda: 64 * "h")
    far = job(data="ogbench:/" + 30 * "folder/" + "cube.npz?task=2")
    Records(tmp_path, "runs").write(far.key, {"a": 1})
    assert far.key != replace(far, seed=1).key and Records(tmp_path, "runs").read() == [{"a": 1}]


def test_packed_records_are_read_and_damage_is_named(tmp_path):
    records = Records(tmp_path, "runs")
    records.write("one", {"a": 1})
    records.packed.write_text((records.folder / "one.json").read_text() + '{"a": 2}\n')
    assert records.read() == [{"a": 1}, {"a": 2}, {"a": 1}]
    with records.packed.open("a") as file:
        file.write('{"a": 3, "b"')
    with pytest.raises(ValueError, match=r"runs\.jsonl: line 3 is no record"):
        records.read()


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
    [
        ("offline", "SAC"),
        ("online", "RACTD"),
        ("offline-to-online", "ConsistencyBC"),
        ("online", "nothing"),
        ("online", "PPO"),
    ],
)
def test_algorithms_that_a_suite_cannot_run_are_refused_at_once(suite, algo):
    with pytest.raises(ValueError, match="algo"):
        jobs_of(suite, [algo], ["d"], [0], 10, 10)


BAD_ACTIVATION = "{'policy_kwargs': {'activation_fn': 'relu'}}"


@pytest.mark.parametrize("options", ["{", "3", "open('x')", "{'seed': 1}", BAD_ACTIVATION, "{{'eta': 1}}"])
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


def test_a_killed_worker_fails_its_own_job_only(dataset, tmp_path):
    jobs = [
        job(algo="SAC", suite="online", options="{}", data="tests.dying:Dying-v0", offline_steps=0, online_steps=20),
        job(),
        job(),
    ]
    (failure,) = run_jobs(jobs, tmp_path)
    assert "Dying-v0" in failure and "exit code -9" in failure
    assert [done["algo"] for done in Records(tmp_path, "runs").read()] == ["CPQL"]


def test_a_failure_leaves_its_traceback(dataset, tmp_path):
    (failure,) = run_jobs([job(options="{'eta': 'much'}")], tmp_path)
    assert "{'eta': 'much'} on" in failure
    assert "Traceback" in (tmp_path / "failures.log").read_text()


def test_jobs_resume_and_failures_leave_the_others_alone(dataset, tmp_path):
    good, bad = job(), job(algo="Nothing")
    threads = os.environ.get("OMP_NUM_THREADS")
    assert "Nothing" in run_jobs([bad, good], tmp_path, Settings(processes=2))[0]
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


def test_the_denoising_suite_sets_the_steps_itself():
    with pytest.raises(ValueError, match="sampling_steps is given by the suite"):
        jobs_of("denoising", ["DiffusionBC"], ["d"], [0], 10, 0, "{'sampling_steps': 4}")


@pytest.mark.parametrize("option", ["--steps", "--evaluations", "--episodes"])
def test_numbers_that_are_too_small_are_named(option, tmp_path, capsys):
    assert main(["benchmark", "offline", "--quick", option, "0", "--folder", str(tmp_path)]) == 1
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["online", "--print", "3"], "unrecognized arguments: --print 3"),
        (
            ["online", "--print-commands", "2", "--shard", "1/2"],
            "argument --shard: not allowed with argument --print-commands",
        ),
        (["speed", "--shard", "1/2"], "unrecognized arguments: --shard"),
        (["scaling", "--jobs", "2"], "unrecognized arguments: --jobs"),
        (["speed", "--retries", "2"], "--retries is for other executors than local"),
        (["online", "--address", "auto"], "--address is for other executors than local"),
        (["planner", "--executor-options", "{'num_cpus': 2}"], "--executor-options is for other executors than local"),
        (["online", "--executor", "slurm", "--address", "auto"], "--address is for other executors than slurm"),
    ],
)
def test_flags_that_nothing_would_heed_are_refused(arguments, message, tmp_path, capsys):
    try:
        assert main(["benchmark", *arguments, "--folder", str(tmp_path / "new")]) == 1
    except SystemExit as refused:
        assert refused.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_other_work_is_told_from_our_own():
    def busy_seconds():
        return sum(getattr(psutil.cpu_times(), kind) for kind in ("user", "nice", "system", "steal"))

    def work():
        end = time.process_time() + 1
        while time.process_time() < end:
            pass

    before, others = busy_seconds(), load._seconds_of_others()
    work()
    assert load._seconds_of_others() - others <= busy_seconds() - before - 0.9
    # a grandchild whose parent ended is nobody's
    command = f"{sys.executable} -c 'while True: pass' > /dev/null 2>&1 & echo $!"
    orphan = psutil.Process(int(subprocess.check_output(["sh", "-c", command])))
    try:
        watch = load.OtherLoad()
        time.sleep(2)
        assert watch.processors() > 0.2
    finally:
        orphan.kill()


@pytest.fixture
def few_systems(monkeypatch):
    options = {"policy_kwargs": {"net_arch": [8]}}
    chosen = [speed.System("SAC", "SAC", options), speed.System("CPQL", "CPQL", options)]
    monkeypatch.setattr(speed, "systems", lambda: chosen)
    monkeypatch.setattr(speed, "TURN", 0.01)


def test_speed_refuses_a_loaded_machine(few_systems, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(load, "busy", lambda: 93.0)
    command = ["benchmark", "speed", "--quick", "--rounds", "1", "--folder", str(tmp_path)]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "93 % busy" in told and "--force" in told
    assert main([*command, "--force"]) == 0
    assert "loaded machine" in (tmp_path / "README.md").read_text()


def test_speed_measures_training_and_acting(few_systems, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "busy", lambda: 0.0)
    assert main(["benchmark", "speed", "--rounds", "2", "--folder", str(tmp_path)]) == 0
    rows = [row for row in read_rows(tmp_path, "speed") if row["threads"] == 1]
    assert len([row for row in rows if row["what"] == "gradient step"]) == 2
    acting = {(row["system"], row["what"], row["batch"], row["candidates"]) for row in rows if row["what"] != "gradient step"}
    expected = {("SAC", w, b, None) for w in ("predict", "sampler") for b in (1, 256)}
    expected |= {("CPQL", w, b, n) for w in ("predict", "sampler") for b in (1, 256) for n in (1, 50)}
    assert acting == expected | {("CPQL", "exported", b, None) for b in (1, 256)}
    assert all(0 < row["median_us"] <= row["p95_us"] for row in rows)
    text = (tmp_path / "README.md").read_text()
    assert "loaded machine" not in text and "speed_cpu_1.png" in text
    assert "exported as ONNX, in ONNX Runtime, noise drawn by NumPy, batch 256" in text


@pytest.mark.parametrize("algo", ["CPQL", "ConsistencyAC", "ConsistencyBC", "DiffusionQL"])
def test_what_is_measured_is_the_policy_of_an_offline_phase(algo):
    model = speed.build(speed.System(algo, algo, {"policy_kwargs": {"net_arch": [8]}}), "cpu")
    assert model.run.began_with_data and model.run.was_pretrained and not model.policy.actor.model.explores


@pytest.mark.parametrize(("once", "samples"), [(2.0, 3), (0.5, 10)])
def test_calls_of_seconds_are_measured_a_few_times(few_systems, monkeypatch, tmp_path, once, samples):
    monkeypatch.setattr(speed, "timed_calls", lambda model, call, n: [once] * n)
    models = {system.label: speed.build(system, "cpu") for system in speed.systems()}
    rows = list(speed._acting_figures(models, rounds=10, turn=0.01, folder=tmp_path))
    assert {row["samples"] for row in rows} == {samples}


def test_planners_share_a_teacher_and_resume(tmp_path, dataset):
    folder = tmp_path / "out"
    options = repr({"horizon": 4, "policy_kwargs": {"net_arch": [8], "model_kwargs": {"n_levels": 5}}})
    students = [
        "{'reward_weight': 0.0}",
        "{'reward_weight': 5.0, 'policy_kwargs': {'student_kwargs': {'dsm_target': 'jump'}}}",
    ]
    command = ["benchmark", "planner", "--datasets", DATA, "--steps", "6", "2", "4", "--episodes", "2"]
    command += ["--options", options, "--folder", str(folder), "--students"]
    assert main([*command, students[0]]) == 0
    teacher_file = next(folder.glob("teacher_*.zip"))
    written = teacher_file.stat().st_mtime_ns
    assert main([*command, *students]) == 0
    runs = sorted(Records(folder, "runs").read(), key=lambda run: run["student"])
    assert [(run["student"], run["offline_steps"]) for run in runs] == [("", 6), *((student, 6) for student in students)]
    assert [[p["passes"] for p in run["planners"]] for run in runs] == [[8, 20], [1, 2, 4], [1, 2, 4]]
    assert runs[1]["planners"][0]["deterministic"] != runs[2]["planners"][0]["deterministic"]
    text = (folder / "README.md").read_text()
    assert "teacher, 6 steps `'horizon': 4" in text and "student `'reward_weight': 5.0, 'policy_kwargs'" in text
    teachers, _ = planner_jobs([DATA], [0], (6, 2, 4), students, options, 2)
    assert teachers[0].is_done(folder, runs) and teacher_file.stat().st_mtime_ns == written
    teacher_file.unlink()
    assert not teachers[0].is_done(folder, runs)  # so it runs again


def test_planners_are_the_same_in_whatever_order_their_options_are_told(tmp_path):
    def planners(options, student):
        return [job for (job,) in planner_jobs(["d"], [0], (1, 1, 1), [student], options)]

    told = ("{'horizon': 4, 'compile': {'b': 1, 'a': 2}}", "{'reward_weight': 0.1, 'gamma': 0.9}")
    other = ("{'compile': {'a': 2, 'b': 1}, 'horizon': 4}", "{'gamma': 0.9, 'reward_weight': 0.1}")
    records = [{**asdict(job), "weights": [1]} for job in planners(*told)]
    (tmp_path / planners(*told)[0].teacher_file).touch()
    assert all(job.is_done(tmp_path, records) for job in planners(*other))
    assert not planners(told[0], "{}")[1].is_done(tmp_path, records)
    seen = {"scored": False, "behaviour": 1.0}
    seen["planners"] = [{"passes": 1, "deterministic": 1.0, "sampled": 1.0, "acting_us": 1.0}]
    table = planner_section([{**asdict(job), **seen} for job in (*planners(*told), *planners(*other))])
    assert len(table.splitlines()) == 4  # a teacher and a student


def test_teachers_of_before_are_found(tmp_path):
    ((teacher,), _) = planner_jobs(["d"], [0], (1, 1, 1), options="{'horizon': 4, 'compile': True}")
    (tmp_path / "teacher_bb7ad524d691.zip").touch()
    assert teacher.is_done(tmp_path, [asdict(teacher)]) and teacher.teacher_file != "teacher_bb7ad524d691.zip"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--students", "5"], "--students must be the text of a dict of plain values, got '5'"),
        (["--options", "[]"], "--options must be the text of a dict of plain values, got '[]'"),
        (["--options", "{'seed': 1}"], "--options: seed is given by --seeds"),
        (["--students", "{'reward_steps': 1}"], "--students: reward_steps is given by --steps"),
        (["--steps", "1", "0", "1"], "--steps must be at least 1 each, got 1 0 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--episodes", "0"], "--episodes must be at least 1"),
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
    monkeypatch.setattr(scaling, "ONLINE_ENV", "Pendulum-v1")
    monkeypatch.setattr(scaling, "ENVIRONMENTS", (2,))
    trained, turn = set(), scaling.training_turn

    def noted_turn(model, n_steps):
        trained.add((type(model), model.batch_size))
        return turn(model, n_steps)

    monkeypatch.setattr(scaling, "training_turn", noted_turn)
    assert main(["benchmark", "scaling", "--quick", "--force", "--rounds", "2", "--folder", str(tmp_path)]) == 0
    rows = read_rows(tmp_path, "scaling")
    times = {(r["axis"], r["system"], r["value"]): r["median_us"] for r in rows if r["axis"] != "memory"}
    online = {(f"environments (online), gradient_steps={n}", label, 2) for n in (-1, 1) for label in ("SAC", "CPQL")}
    assert set(times) == {(p.axis, p.system.label, p.value) for p in chosen} | online
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
    assert "Environment steps per second against environments (online), gradient_steps=-1" in text
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
    (run,) = Records(tmp_path, "runs").read()
    assert run["data"] == "sb3-consistency/pendulum/mixed-v0" and run["gymnasium"] and run["minari"]
