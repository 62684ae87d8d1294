"""
Offline scores on Minari datasets: train, evaluate, append one row per run to a CSV; finished rows are skipped.

python examples/offline_scores.py --algos CPQL ConsistencyAC --datasets zoo/hopper/medium-v0 --seeds 0 1 2
"""

import argparse
import ast
import csv
import time
from importlib.metadata import version
from pathlib import Path

import minari
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_consistency


def run(algo: str, dataset: str, seed: int, steps: int, episodes: int, options: dict) -> dict:
    data = minari.load_dataset(dataset)
    behaviour = np.mean([m["rewards_sum"] for m in data.storage.get_episode_metadata(data.episode_indices)])
    model = getattr(sb3_consistency, algo).from_dataset(dataset, seed=seed, **options)
    start = time.perf_counter()
    model.pretrain(steps, progress_bar=True)
    seconds = time.perf_counter() - start
    env = make_vec_env(lambda: data.recover_environment(eval_env=True), n_envs=episodes, seed=1000 + seed)
    row = {"algo": algo, "dataset": dataset, "seed": seed, "steps": steps, "options": str(options)}
    for name, deterministic in {"deterministic": True, "sampled": False}.items():
        returns = evaluate_policy(model, env, episodes, deterministic, return_episode_rewards=True)[0]
        row[name] = round(100 * float(minari.get_normalized_score(data, np.mean(returns))), 2)
    row["behaviour"] = round(100 * float(minari.get_normalized_score(data, behaviour)), 2)
    versions = " ".join(f"{p}={version(p)}" for p in ("torch", "mujoco", "gymnasium", "minari", "stable-baselines3"))
    return {**row, "episodes": episodes, "seconds": round(seconds), "threads": th.get_num_threads(), "versions": versions}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algos", nargs="+", default=["ConsistencyBC", "ConsistencyAC", "CPQL"])
    parser.add_argument("--datasets", nargs="+", default=["zoo/hopper/medium-v0"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="constructor arguments, as a dict")
    parser.add_argument("--csv", type=Path, default=Path("offline_scores.csv"))
    args = parser.parse_args()
    for dataset, seed, algo in [(d, s, a) for d in args.datasets for s in args.seeds for a in args.algos]:
        done = list(csv.DictReader(args.csv.open())) if args.csv.exists() else []
        key = [algo, dataset, str(seed), str(args.steps), str(args.options)]
        if key in [[r[k] for k in ("algo", "dataset", "seed", "steps", "options")] for r in done]:
            continue
        row = run(algo, dataset, seed, args.steps, args.episodes, args.options)
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if not done:
                writer.writeheader()
            writer.writerow(row)
        print({k: row[k] for k in ("algo", "dataset", "seed", "deterministic", "sampled", "behaviour", "seconds")}, flush=True)
