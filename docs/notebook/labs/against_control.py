"""
CPQL, the control (SB3's SAC with its critics and returns), SAC and TQC after 100,000 steps, of the runs in records/online:
what the suite's report, and `make figures`, do not tell. Differences of interquartile means over MuJoCo's environments and
the seeds, in units of SAC's final score, with intervals; TQC's, and CPQL's beside them, are of the seeds that TQC has.

    python docs/notebook/labs/against_control.py
"""

import sys
from pathlib import Path

from sb3_consistency.benchmark.drawing import with_interval
from sb3_consistency.benchmark.intervals import area_under_curve, estimate, final_return, grouped, references

sys.path.insert(0, str(Path(__file__).parents[2]))
import figures

RUNS = [run for run in figures.records("online") if run["online_steps"] == 100_000 and run["data"] in figures.MUJOCO]
CONTROL = {"algo": "LayerNormSAC", "options": "{'n_steps': 3}"}
kinds = {
    "CPQL": [run for run in RUNS if run["algo"] == "CPQL" and figures.by_default(run)],
    "control": [run for run in RUNS if run.items() >= CONTROL.items()],
    "SAC": [run for run in RUNS if run["algo"] == "SAC" and figures.by_default(run)],
    "TQC": [run for run in RUNS if run["algo"] == "TQC" and figures.by_default(run)],
}
seeds = {run["seed"] for run in kinds["TQC"]}
kinds["CPQL, as TQC"] = [run for run in kinds["CPQL"] if run["seed"] in seeds]
known = references(kinds["SAC"])
for name, value in (("last three", final_return), ("area", area_under_curve)):
    groups = {
        kind: grouped(runs, lambda run, value=value: known[run["data"]].score(value(run)), figures.MUJOCO)
        for kind, runs in kinds.items()
    }
    for kind, other in (("CPQL", "control"), ("control", "SAC"), ("CPQL, as TQC", "TQC")):
        print(f"{name}, {kind} - {other}:", with_interval(estimate(groups[kind], groups[other]), 2))
