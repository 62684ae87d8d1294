"""
CPQL, the control (SB3's SAC with its critics and returns), SAC and TQC after 100,000 steps, of the runs in records/online:
what the suite's report, and `make figures`, do not tell. Differences of interquartile means over MuJoCo's environments and
the seeds, in units of SAC's final score, with intervals.

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
kinds = {name: [run for run in RUNS if run["algo"] == name and figures.by_default(run)] for name in ("CPQL", "SAC", "TQC")}
kinds["control"] = [run for run in RUNS if run.items() >= CONTROL.items()]
known = references(kinds["SAC"])
for name, value in (("last three", final_return), ("area", area_under_curve)):
    groups = {
        kind: grouped(runs, lambda run, value=value: known[run["data"]].score(value(run)), figures.MUJOCO)
        for kind, runs in kinds.items()
    }
    for kind, other in (("CPQL", "control"), ("control", "SAC"), ("CPQL", "TQC")):
        print(f"{name}, {kind} - {other}:", with_interval(estimate(groups[kind], groups[other]), 2))
