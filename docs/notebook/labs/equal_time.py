"""
Runs of 30,000 steps against CPQL's default at the same CPU time, seed 0: return, seconds, and what the default had by then.

    python docs/notebook/labs/equal_time.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import figures

RUNS = [run for run in figures.records("online") if run["seed"] == 0 and "online_cpu_seconds" in run]
for env in ("HalfCheetah-v5", "Hopper-v5"):
    long = [run for run in RUNS if run["data"] == env and run["online_steps"] == 100_000 and figures.by_default(run)]
    default = next(run for run in long if run["algo"] == "CPQL")
    for run in long:
        n = sum(point["step"] <= 30_000 for point in run["curve"])
        print(env, run["algo"], round(run["curve"][n - 1]["return"]), f"{run['online_cpu_seconds'] * 0.3:.0f} s")
    for run in RUNS:
        # those with six evaluations: section 29 of online_lab.md
        if run["data"] == env and run["online_steps"] == 30_000 and len(run["curve"]) == 6:
            reached = int(len(default["curve"]) * run["online_cpu_seconds"] / default["online_cpu_seconds"])
            by_then = round(default["curve"][reached - 1]["return"])
            print(env, run["algo"], run["options"], round(run["curve"][-1]["return"]), f"{run['online_cpu_seconds']:.0f} s", by_then)
