"""Benchmark reports: what tables and plots make of records."""

import re
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from sb3_consistency.__main__ import main
from sb3_consistency.benchmark.drawing import styles_of
from sb3_consistency.benchmark.intervals import (
    aggregates,
    comparable,
    cpu_seconds_to,
    display_names,
    estimate,
    grouped,
    labels,
    library_last,
    references,
    score_of,
)
from sb3_consistency.benchmark.jobs import Job
from sb3_consistency.benchmark.published import published_score
from sb3_consistency.benchmark.records import Records
from sb3_consistency.benchmark.report import latest, score_table, write_report
from sb3_consistency.benchmark.score_plots import draw_aggregate, draw_curves, draw_denoising
from sb3_consistency.benchmark.speed_report import ratio_table, scaling_sections
from sb3_consistency.benchmark.suites import DENOISING_STEPS
from sb3_consistency.registry import COLOURS


def record(algo="CPQL", data="mujoco/hopper/medium-v0", seed=0, score=50.0, **more):
    curve = [{"phase": "offline", "step": n, "return": 30 * score, "score": score} for n in (5, 10)]
    scores = {"deterministic_score": score, "sampled_score": score, "behaviour_score": 40.0}
    returns = {key.replace("score", "return"): 30 * value for key, value in scores.items()}
    base = {"suite": "offline", "algo": algo, "options": "{}", "data": data, "seed": seed, "offline_steps": 10}
    base |= {"episodes": 10, "evaluations": 2}
    base |= {"online_steps": 0, "offline_seconds": 1.0, "acting_us": 200.0, "processes": 1, "threads": 1}
    return {**base, **scores, **returns, "curve": curve, "commit": "abc", "processor": "p", "torch": "2", **more}


def aggregate(runs):
    return estimate(grouped(runs, score_of))


def add(folder, run):
    name = f"{len(list(folder.glob('runs/*')))}"
    Records(folder, "runs").write(name, run)


def test_interquartile_mean_and_its_interval():
    runs = [record(seed=i, score=float(s)) for i, s in enumerate([0, 10, 20, 100])]
    mean, low, high = aggregate(runs)
    assert mean == 15 and 0 <= low < mean < high <= 100
    constant = aggregate([record(seed=i, score=5.0) for i in range(3)])
    assert constant == (5, 5, 5)
    assert np.isnan(aggregate([record()])[1])


def test_interquartile_means_of_deterministic_and_of_sampled_actions(tmp_path):
    for algo, sampled in {"CPQL": 20.0, "DiffusionQL": 30.0}.items():
        for seed in range(3):
            add(tmp_path, record(algo, seed=seed, score=7.0 + seed, sampled_score=sampled))
    text = write_report(tmp_path).read_text()
    assert re.search(r"\| CPQL +\| 8.0 \[7.0, 9.0\] +\| 20.0 \[20.0, 20.0\] +\| 3 ", text)
    assert re.search(r"\| DiffusionQL +\| 8.0 \[7.0, 9.0\] +\| 30.0 \[30.0, 30.0\] +\| 3 ", text)


def test_bootstrap_is_stratified_by_dataset():
    """Datasets with very different scores: resampling within each leaves the mean where it is."""
    runs = [record(data=data, seed=i, score=s + i) for data, s in {"a": 0.0, "b": 100.0}.items() for i in range(3)]
    mean, low, high = aggregate(runs)
    assert mean == pytest.approx(51) and high - low < 5


def test_published_scores_are_marked_as_theirs():
    assert published_score("DiffusionQL", "mujoco/hopper/medium-v0") == 90.5
    assert published_score("DiffusionQL", "zoo/hopper/medium-v0") is None
    runs = [record("DiffusionQL", seed=i, score=s) for i, s in enumerate([40.0, 60.0])]
    table = score_table("offline", runs)
    assert "theirs" in table and "90.5" in table and "50.0 ± 14.1" in table and "Ding & Jin 2024" in table
    assert "90.5" not in score_table("offline-to-online", runs)  # theirs did not go on online
    returns = [{k: v for k, v in run.items() if not k.endswith("score")} for run in runs]
    assert "90.5" not in score_table("offline", returns)


def test_report_holds_every_suite(tmp_path):
    for seed in (0, 1):
        for algo in ("CPQL", "DiffusionQL"):
            add(tmp_path, record(algo, seed=seed, score=50.0 + seed))
    for algo, name in {"ConsistencyBC": "sampling_steps", "DiffusionBC": "diffusion_steps"}.items():
        for n in (1, 2):
            add(tmp_path, record(algo, suite="denoising", options=repr({name: n})))
    add(tmp_path, record("CPQL", "ogbench:cube.npz?task=2", suite="denoising", options="{'sampling_steps': 1}"))
    text = write_report(tmp_path).read_text()
    assert "## Offline" in text and "## Number of denoising steps" in text
    pngs = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pngs == [
        "denoising_10_2_10.png",
        "denoising_10_2_10_mujoco_hopper_medium-v0_steps.png",
        "denoising_10_2_10_ogbench_cube.npz_task_2_steps.png",
        "offline_10_2_10.png",
        "offline_10_2_10_aggregate.png",
    ]
    assert all(name in text for name in pngs)


def test_runs_of_different_length_are_no_seeds_of_each_other(tmp_path):
    add(tmp_path, record(score=10.0))
    add(tmp_path, record(score=80.0, offline_steps=1000, evaluations=3))
    text = write_report(tmp_path).read_text()
    assert "10.0" in text and "80.0" in text and "45.0" not in text


def test_equal_sums_of_steps_have_figures_of_their_own(tmp_path):
    for offline, online in ((100, 50), (50, 100)):
        more = {"suite": "offline-to-online", "offline_steps": offline, "online_steps": online}
        add(tmp_path, record(online_seconds=1.0, **more))
    write_report(tmp_path)
    assert len(list(tmp_path.glob("offline-to-online_*.png"))) == 2


def test_means_over_datasets_need_the_same_datasets():
    one, other = record("CPQL", data="a"), record("DiffusionQL", data="a")
    both = ["CPQL", "DiffusionQL"]
    assert comparable([one, other]) == []  # a mean of one
    assert comparable([one, record("CPQL", data="a", seed=1), other]) == both
    assert comparable([one, record("CPQL", data="b"), other]) == []
    elsewhere = [record(algo, data="b") for algo in both]
    # what ran on some of the data only does not take the others' figure away
    ablation = record("CPQL", data="a", options="{'eta': 3.0}")
    assert comparable([one, other, *elsewhere, ablation]) == both
    returns = [{k: v for k, v in record(algo, data=d).items() if not k.endswith("score")} for d in "ab" for algo in both]
    assert comparable(returns) == []
    successes = [{**run, "deterministic_success": 0.5} for run in returns]
    assert comparable(successes) == both
    assert comparable([one, other, *successes[2:]]) == []  # percentages of two kinds


def test_more_seeds_on_one_dataset_do_not_weigh_more():
    few = [record(data="b", seed=i, score=100.0 + i) for i in range(2)]
    many = [record(data="a", seed=i, score=float(i)) for i in range(6)]
    assert aggregate([*few, *many])[0] == pytest.approx(50.5)


def test_records_of_one_job_are_one_seed(tmp_path):
    for score, commit in ((10.0, "old"), (30.0, "new")):
        add(tmp_path, record(score=score, commit=commit))
    text = write_report(tmp_path).read_text()
    assert "30.0" in text and "±" not in text and "old" not in text


def test_reference_returns_that_were_added_later(tmp_path):
    later = record(seed=1)
    earlier = {key: value for key, value in record().items() if not key.endswith("_score")}
    for runs in ([later, earlier], [earlier, later]):
        table = score_table("offline", runs)
        assert "return, deterministic" in table and "1500 ± 0.0" in table
    for run in (later, earlier):
        add(tmp_path, run)
    write_report(tmp_path)


def test_seeds_of_several_commits_are_marked():
    assert "abc, def" in score_table("offline", [record(), record(seed=1, commit="def")])


def test_names_lie_beside_the_lines_one_under_the_other_in_the_colour_of_the_algorithm():
    options = repr({"policy_kwargs": {"model_kwargs": {"sampling_share": 0.0, "n": list(range(3))}}})
    runs = [record(algo, seed=seed, options=o) for algo in COLOURS for o in (options, "{}") for seed in (0, 1)]
    figure = draw_curves(runs)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert axis.get_window_extent().width > 0.4 * figure.bbox.width
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == 2 * len(COLOURS) + 1  # the behaviour's, too
    assert all(upper.y0 >= lower.y1 - 0.4 * lower.height for lower, upper in pairwise(boxes))
    assert min(box.y0 for box in boxes) > 0 and max(box.y1 for box in boxes) < figure.bbox.y1
    assert all(box.x0 >= axis.get_window_extent().x1 for box in boxes)
    # with the same settings, in every figure
    colours = {text.get_text(): text.get_color() for text in axis.texts}
    assert {name: colours[library_last(name)] for name in COLOURS} == COLOURS
    aggregate_figure = draw_aggregate(aggregates(runs, comparable(runs)), display_names(runs), "return")
    assert {line.get_color() for line in aggregate_figure.axes[0].lines} == set(COLOURS.values())
    # a mean, and a thin line for each seed
    widths = [line.get_linewidth() for line in axis.lines]
    assert widths.count(2) == 2 * len(COLOURS) and widths.count(0.6) == 4 * len(COLOURS)


def test_names_are_no_dicts_and_leave_out_what_all_share():
    shared = {"compile": True, "policy_kwargs": {"net_arch": [8]}}
    runs = [record(options=repr({**shared, "eta": 3.0})), record(options=repr(shared))]
    runs.append(record("d3rlpy:IQL", options="{'expectile': 0.9}"))
    assert list(display_names(runs).values()) == ["CPQL, eta=3.0", "CPQL", "IQL (d3rlpy), expectile=0.9"]


@pytest.mark.parametrize(
    ("options", "other", "told"),
    [
        ({"net_arch": [64, 64], "alpha": 1}, {"net_arch": [64, 64], "alpha": 2}, ["CPQL, alpha=1", "CPQL, alpha=2"]),
        ({"a": {"n": 1}, "b": {"n": 2}}, {"a": {"n": 2}, "b": {"n": 2}}, ["CPQL, a.n=1", "CPQL, a.n=2"]),
        ({"a": {"n": 1}}, {"b": {"n": 1}}, ["CPQL, a.n=1", "CPQL, b.n=1"]),
    ],
)
def test_two_settings_have_two_names(options, other, told):
    assert list(display_names([record(options=repr(options)), record(options=repr(other))]).values()) == told


def test_the_last_point_of_a_curve_is_the_record(tmp_path):
    before = record(score=727.0)
    before |= {"deterministic_score": 616.0, "deterministic_return": 30 * 616.0}  # SB3 evaluated before the last step
    (run,) = latest([before])
    (line,) = [line for line in draw_curves([run]).axes[0].lines if line.get_linewidth() == 2]
    assert line.get_ydata()[-1] == 616
    assert "616.0" in score_table("offline", [run])


def online_run(algo, env, seed, final, area=None, random=10.0, **more):
    values = [2 * (area or final) - final] * 3 + [final] * 3
    curve = [{"phase": "online", "step": 5 * i, "return": v} for i, v in enumerate(values, start=1)]
    run = record(algo, env, seed, suite="online", offline_steps=0, online_steps=30, online_seconds=1.0, **more)
    run = {key: value for key, value in run.items() if not key.endswith("_score") and key != "offline_seconds"}
    return {**run, "curve": curve, "deterministic_return": final, "random_return": random, "online_cpu_seconds": 0.6}


@pytest.mark.parametrize("options", ["{}", "{'gamma': 0.9}"])
def test_online_scores_are_relative_to_sac_and_to_chance(options, tmp_path):
    for seed in range(3):
        for env, sac, ours in (("Hopper-v5", 110.0, 210.0), ("HalfCheetah-v5", 1010.0, 1510.0)):
            add(tmp_path, online_run("SAC", env, seed, sac, options=options))
            add(tmp_path, online_run("CPQL", env, seed, ours, area=sac, options=options))
    text = write_report(tmp_path).read_text()
    row = re.findall(r"\| CPQL +\| (.*) \|", text[text.index("Relative to SAC") :])[0]
    cells = [cell.strip() for cell in row.split("|")]
    # (210 - 10) / (110 - 10) = 2 and 1.5; the area is SAC's
    assert cells[0] == "1.75 [1.75, 1.75]" and cells[1] == "0.75 [0.75, 0.75]"
    assert cells[2] == "1.00 [1.00, 1.00]" and cells[3] == "0.00 [0.00, 0.00]"
    assert cells[4] == "3" and cells[5] == "20.00"  # 0.6 s in 30 steps
    # of Hopper's evaluations, 10 10 10 210 210 210, three in a row are above 110 on average at 25 of 30 steps
    assert cells[6] == "0.83 [0.83, 0.83]"
    by_environment = text[text.index("By environment") :]
    (row,) = re.findall(r"\| Hopper-v5 +\| CPQL +\| (.*) \|", by_environment)
    assert [cell.strip() for cell in row.split("|")][::2] == ["210 [210, 210]", "110 [110, 110]", "1.00"]
    assert [cell.strip() for cell in row.split("|")][1::2] == ["100 [100, 100]", "0 [0, 0]"]
    assert (tmp_path / "online_30_2_10_normalised.png").stat().st_size > 5000


def test_the_report_tells_of_the_seed_that_kept_least(tmp_path):
    for seed in range(2):
        add(tmp_path, online_run("SAC", "Hopper-v5", seed, 110.0))
        # of seed 1 410 410 410 10 10 10, and 110 above chance in the end
        add(tmp_path, online_run("CPQL", "Hopper-v5", seed, 110.0, area=260.0 if seed else None))
    text = write_report(tmp_path).read_text()
    assert re.findall(r"\| Hopper-v5 +\| (\w+) .*\| (\S+) +\|", text[text.index("By environment") :]) == [
        ("SAC", "1.00"),
        ("CPQL", "0.25"),
    ]


def test_options_in_another_order_are_the_same(tmp_path):
    told = ("{'gamma': 0.9, 'eta': {'b': 1, 'a': 2.0}}", "{'eta': {'a': 2.0, 'b': 1}, 'gamma': 0.9}")
    runs = [record("CPQL", options=o) for o in told]
    (name,) = labels(runs)
    assert name == "CPQL {'eta': {'a': 2.0, 'b': 1}, 'gamma': 0.9}"
    # no second seed, and none that is to be run again
    assert latest(runs) == runs[1:]
    job = Job(**{field.name: runs[0][field.name] for field in fields(Job)})
    assert job.is_done(tmp_path, runs[1:]) and not replace(job, options="{'gamma': 0.9}").is_done(tmp_path, runs)


def test_scores_are_relative_to_sac_as_it_comes():
    runs = [
        online_run("SAC", "Hopper-v5", 0, final, options=options)
        for options, final in (("{'learning_rate': 0.01}", 20.0), ("{}", 110.0), ("{'n_steps': 3}", 50.0))
    ]
    assert references(runs)["Hopper-v5"].sac == 110
    assert references(runs[::2])["Hopper-v5"].sac == 20


def test_how_long_it_takes_to_a_return():
    run = online_run("CPQL", "Hopper-v5", 0, 210.0, area=110.0)  # 10 10 10 210 210 210
    assert [cpu_seconds_to(run, wanted) for wanted in (10, 70, 76.6, 210, 211)] == pytest.approx([0.3, 0.4, 0.4, 0.6, 1.2])
    assert cpu_seconds_to(run | {"curve": run["curve"][3:4]}, 210) == pytest.approx(0.4)


@pytest.mark.parametrize("sac", [10.0, -20.0])
def test_an_environment_where_sac_learned_nothing_is_left_out(tmp_path, sac):
    for seed in range(2):
        for algo, final in (("SAC", sac), ("CPQL", 50.0)):
            add(tmp_path, online_run(algo, "Hopper-v5", seed, final))
            add(tmp_path, online_run(algo, "Ant-v5", seed, 100.0))
    text = write_report(tmp_path).read_text()
    assert "over 1 environments" in text and "Left out: Hopper-v5" in text


def test_an_algorithm_that_lacks_an_environment_is_left_out_aloud(tmp_path):
    for algo, env in (("SAC", "Ant-v5"), ("CPQL", "Ant-v5"), ("TQC", "Ant-v5"), ("SAC", "Hopper-v5"), ("CPQL", "Hopper-v5")):
        add(tmp_path, online_run(algo, env, 0, 100.0))
    assert "Left out of the means, as they did not run on all of the data: TQC." in write_report(tmp_path).read_text()


def test_every_number_of_steps_has_a_style():
    assert len(set(styles_of([f"ConsistencyBC {n}" for n in DENOISING_STEPS]).values())) == len(DENOISING_STEPS)


def test_successes_take_the_place_of_returns():
    more = {"deterministic_success": 0.25, "sampled_success": 0.5, "behaviour_return": -981.0}
    runs = [{k: v for k, v in record(data=d, **more).items() if not k.endswith("_score")} for d in ("ogbench:a", "ogbench:b")]
    assert "success, %, deterministic" in score_table("offline", runs) and "25.0" in score_table("offline", runs)
    assert "981" not in score_table("offline", runs), "a return of the data stands beside no successes"


def test_the_denoising_figure_separates_what_the_table_separates():
    runs = [
        record("CPQL", options=repr({**more, "sampling_steps": n}), score=score, offline_seconds=seconds, processes=processes)
        for more, score, seconds, processes in (({}, 10.0, 1.0, 1), ({"compile": True}, 90.0, 0.5, 2))
        for n in (1, 2)
    ]
    scores, acting, training = draw_denoising(runs, "data").axes
    means = [list(line.get_ydata()) for line in scores.lines if line.get_marker() == "o"]
    assert means == [[10.0, 10.0], [90.0, 90.0]]
    assert len({text.get_text() for text in acting.texts}) == 1  # the others shared the machine
    assert list(training.lines[0].get_ydata()) == [100.0, 100.0]  # ms per step


def test_report_of_a_folder_without_records(tmp_path, capsys):
    folder = tmp_path / "typo"
    assert main(["benchmark", "report", "--folder", str(folder)]) == 1
    assert "no benchmark records" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize("shared", [{"processes": 2}, {"other_load": 0.9}, {"resumed": True}])
def test_times_of_runs_that_shared_the_machine_are_left_out(tmp_path, shared):
    add(tmp_path, record(**shared))
    assert "ms per step" not in write_report(tmp_path).read_text()
    add(tmp_path, record(seed=1, other_load=0.1))
    assert "100.00" in write_report(tmp_path).read_text()


def test_of_every_axis_the_last_run_counts(tmp_path):
    def step(axis, run, milliseconds):
        figure = {"axis": axis, "run": run, "value": 64, "system": "CPQL", "median_us": 1000 * milliseconds, "threads": 1}
        return {**figure, "load_percent": 1.0}

    records = [step("width", "1", 7.0), step("critics", "1", 8.0), step("width", "2", 9.0)]
    text = "".join(scaling_sections(records, tmp_path))
    assert "against critics" in text and text.count("against width") == 1
    assert "| 8 " in text and "| 9 " in text and "| 7 " not in text


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


def test_exported_policies_are_compared_with_predict_of_the_same_run():
    rows = [
        {"system": "CPQL", "what": what, "candidates": n, "median_us": time, "p95_us": time}
        for what, n, time in (("predict", 1, 200.0), ("predict", 50, 999.0), ("exported", None, 40.0))
    ]
    frame = pd.DataFrame(rows)
    header, _, line = ratio_table(frame[2:], predict=frame[:2]).splitlines()
    cells = dict(zip(*([cell.strip() for cell in row.split("|")] for row in (header, line)), strict=True))
    assert cells["x its predict"] == "5.00"
