"""
Deterministic actions by the actor's moving average against those by the actor itself, of the runs in records/online: a row of
Markdown per run, in brackets the actor itself; then the mean difference in units of SAC's final score, with its interval.

    python docs/notebook/labs/averaged_actor.py
"""

import ast
import json
from pathlib import Path

import numpy as np

from sb3_consistency.benchmark.intervals import Run, area_under_curve, best_return, final_return, references

RUNS = [json.loads(line) for line in (Path(__file__).parents[1] / "records" / "online" / "runs.jsonl").read_text().splitlines()]
AVERAGED = {"policy_delay": 2, "deterministic_policy": "ema"}


def with_options(options: dict[str, object]) -> dict[tuple[str, int], Run]:
    """Runs of CPQL with these options, compiled or not, by environment and seed."""
    own = [(run, {k: v for k, v in ast.literal_eval(run["options"]).items() if k != "compile"}) for run in RUNS]
    return {(run["data"], run["seed"]): run for run, o in own if run["algo"] == "CPQL" and o == options and len(run["curve"]) == 20}


def swing(run: Run) -> float:
    """Mean difference of two evaluations in a row, from 30,000 steps on."""
    return float(np.abs(np.diff([point["return"] for point in run["curve"]][5:])).mean())


averaged, itself = with_options(AVERAGED), with_options({"policy_delay": 2})
known = references([run for run in RUNS if run["algo"] == "SAC" and run["options"] == "{}" and run["online_steps"] == 100_000])
differences: dict[str, list[tuple[float, float, float]]] = {}
print("| | seed | by the average, every 5,000 steps | last three | area | kept of the best | swing |\n|---|---|---|---|---|---|---|")
for (place, seed), run in sorted(averaged.items()):
    pair = (run, itself[place, seed])
    kept = [known[place].score(final_return(r)) / known[place].score(best_return(r)) for r in pair]
    curve = " ".join(f"{point['return']:.0f}" for point in run["curve"])
    columns = [[measure(r) for r in pair] for measure in (final_return, area_under_curve)]
    cells = [f"{a:.0f} ({b:.0f})" for a, b in columns] + [f"{kept[0]:.2f} ({kept[1]:.2f})"]
    swings = [swing(r) for r in pair]
    print(f"| {place.removesuffix('-v5')} | {seed} | {curve} | {' | '.join(cells)} | {swings[0]:.0f} ({swings[1]:.0f}) |")
    final, area = (known[place].score(a) - known[place].score(b) for a, b in columns)
    differences.setdefault(place, []).append((final, area, swings[0] / swings[1]))

groups, rng = [np.array(x) for x in differences.values()], np.random.default_rng(0)
means = [np.concatenate([x[rng.integers(len(x), size=len(x))] for x in groups]).mean(axis=0) for _ in range(2000)]
print(f"\nmean of {len(np.concatenate(groups))} pairs: last three, area (of SAC's final score), swing (as a ratio)")
print(np.concatenate(groups).mean(axis=0).round(2), *np.percentile(means, [2.5, 97.5], axis=0).round(2))
