"""Benchmark reports: what tables and plots make of records."""

import re

import numpy as np
import pandas as pd
import pytest

from sb3_consistency.__main__ import main
from sb3_consistency.benchmark.published import published_score
from sb3_consistency.benchmark.records import Records
from sb3_consistency.benchmark.report import score_table, write_report
from sb3_consistency.benchmark.score_plots import (
    aggregate,
    aggregates,
    comparable,
    draw_aggregate,
    draw_curves,
    draw_denoising,
)
from sb3_consistency.benchmark.speed_report import ratio_table


def record(algo="CPQL", data="mujoco/hopper/medium-v0", seed=0, score=50.0, **more):
    curve = [{"phase": "offline", "step": n, "return": 30 * score, "score": score} for n in (5, 10)]
    scores = {"deterministic_score": score, "sampled_score": score, "behaviour_score": 40.0}
    returns = {key.replace("score", "return"): 30 * value for key, value in scores.items()}
    base = {"suite": "offline", "algo": algo, "options": "{}", "data": data, "seed": seed, "offline_steps": 10}
    base |= {"episodes": 10, "evaluations": 2}
    base |= {"online_steps": 0, "offline_seconds": 1.0, "acting_us": 200.0, "processes": 1, "threads": 1}
    return {**base, **scores, **returns, "curve": curve, "commit": "abc", "processor": "p", "torch": "2", **more}


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
            Records(tmp_path, "runs").append(record(algo, seed=seed, score=7.0 + seed, sampled_score=sampled))
    text = write_report(tmp_path).read_text()
    assert re.search(r"\| CPQL \(seeds: 3\) +\| 8.0 \[7.0, 9.0\] +\| 20.0 \[20.0, 20.0\]", text)
    assert re.search(r"\| DiffusionQL \(seeds: 3\) +\| 8.0 \[7.0, 9.0\] +\| 30.0 \[30.0, 30.0\]", text)


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
        "denoising_10_2_10_mujoco_hopper_medium-v0.png",
        "denoising_10_2_10_mujoco_hopper_medium-v0_steps.png",
        "offline_10_2_10_aggregate.png",
        "offline_10_2_10_mujoco_hopper_medium-v0.png",
    ]
    assert all(name in text for name in pngs)
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 8 and len(pd.read_csv(tmp_path / "curves.csv")) == 16


def test_runs_of_different_length_are_no_seeds_of_each_other(tmp_path):
    records = Records(tmp_path, "runs")
    records.append(record(score=10.0))
    records.append(record(score=80.0, offline_steps=1000, evaluations=3))
    text = write_report(tmp_path).read_text()
    assert "10.0" in text and "80.0" in text and "45.0" not in text


def test_equal_sums_of_steps_have_figures_of_their_own(tmp_path):
    for offline, online in ((100, 50), (50, 100)):
        more = {"suite": "offline-to-online", "offline_steps": offline, "online_steps": online}
        Records(tmp_path, "runs").append(record(online_seconds=1.0, **more))
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


def test_more_seeds_on_one_dataset_do_not_weigh_more():
    few = [record(data="b", seed=i, score=100.0 + i) for i in range(2)]
    many = [record(data="a", seed=i, score=float(i)) for i in range(6)]
    assert aggregate([*few, *many])[0] == pytest.approx(50.5)


def test_records_of_one_job_are_one_seed(tmp_path):
    for score, commit in ((10.0, "old"), (30.0, "new")):
        Records(tmp_path, "runs").append(record(score=score, commit=commit))
    text = write_report(tmp_path).read_text()
    assert "30.0" in text and "±" not in text and "old" not in text


def test_reference_returns_that_were_added_later(tmp_path):
    later = record(seed=1)
    earlier = {key: value for key, value in record().items() if not key.endswith("_score")}
    for runs in ([later, earlier], [earlier, later]):
        table = score_table("offline", runs)
        assert "return, deterministic" in table and "1500 ± 0.0" in table
    for run in (later, earlier):
        Records(tmp_path, "runs").append(run)
    write_report(tmp_path)


def test_seeds_of_several_commits_are_marked():
    assert "abc, def" in score_table("offline", [record(), record(seed=1, commit="def")])


def test_long_options_leave_room_for_the_plot(recwarn):
    options = repr({"policy_kwargs": {"model_kwargs": {"sampling_share": 0.0, "n": list(range(60))}}})
    runs = [record(algo, seed=seed, options=options) for algo in ("CPQL", "DiffusionQL") for seed in (0, 1)]
    for figure in draw_curves(runs, "data"), draw_aggregate(aggregates(runs, comparable(runs)), "return"):
        figure.draw_without_rendering()
        plots, whole = [axis.get_window_extent() for axis in figure.axes], figure.bbox
        assert plots[-1].x1 - plots[0].x0 > 0.8 * whole.width
        (legend,) = figure.legends
        frame = legend.get_window_extent()
        assert whole.x0 <= frame.x0 and frame.x1 <= whole.x1 and frame.y1 < min(plot.y0 for plot in plots)
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]


def test_the_denoising_figure_separates_what_the_table_separates():
    runs = [
        record("CPQL", options=repr({**more, "sampling_steps": n}), score=score, offline_seconds=seconds, processes=processes)
        for more, score, seconds, processes in (({}, 10.0, 1.0, 1), ({"compile": True}, 90.0, 0.5, 2))
        for n in (1, 2)
    ]
    scores, acting, training = draw_denoising(runs, "data").axes
    assert [list(line.get_ydata()) for line in scores.lines] == [[10.0, 10.0], [90.0, 90.0]]
    assert len(acting.lines) == 1  # the others shared the machine
    assert list(training.lines[0].get_ydata()) == [100.0, 100.0]  # ms per step


def test_report_of_a_folder_without_records(tmp_path, capsys):
    folder = tmp_path / "typo"
    assert main(["benchmark", "report", "--folder", str(folder)]) == 1
    assert "no benchmark records" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize("shared", [{"processes": 2}, {"other_load": 0.9}])
def test_times_of_runs_that_shared_the_machine_are_left_out(tmp_path, shared):
    Records(tmp_path, "runs").append(record(**shared))
    assert "ms per step" not in write_report(tmp_path).read_text()
    Records(tmp_path, "runs").append(record(seed=1, other_load=0.1))
    assert "100.00" in write_report(tmp_path).read_text()


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
