"""
Online from scratch, side by side with SB3's SAC at equal environment steps: one CSV row per evaluation, and a PNG.

python examples/03_online_vs_sac.py --env Pendulum-v1 --steps 10000 --seeds 0 1 2
"""

import argparse
import ast
import csv
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import stable_baselines3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

import sb3_consistency


def train(algo: str, env_id: str, seed: int, steps: int, options: dict) -> list[tuple[int, float]]:
    package = stable_baselines3 if algo in ("SAC", "TD3") else sb3_consistency
    model = getattr(package, algo)("MlpPolicy", make_vec_env(env_id, seed=seed), seed=seed, **options)
    eval_env = make_vec_env(env_id, n_envs=5, seed=1000 + seed)
    with tempfile.TemporaryDirectory() as folder:
        callback = EvalCallback(eval_env, n_eval_episodes=10, eval_freq=steps // 10, log_path=folder, verbose=0)
        model.learn(steps, callback=callback)
        log = np.load(Path(folder) / "evaluations.npz")
    return list(zip(log["timesteps"].tolist(), log["results"].mean(axis=1).tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algos", nargs="+", default=["SAC", "CPQL"])
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="constructor arguments of our algorithms")
    parser.add_argument("--csv", type=Path, default=Path("online.csv"))
    args = parser.parse_args()
    rows = list(csv.reader(args.csv.open())) if args.csv.exists() else []
    for seed, algo in [(s, a) for s in args.seeds for a in args.algos]:
        options = {} if algo in ("SAC", "TD3") else args.options
        name = algo + (f" {options}" if options else "")
        if any(row[:3] == [args.env, name, str(seed)] for row in rows):
            continue
        new = [[args.env, name, str(seed), str(t), f"{v:.1f}"] for t, v in train(algo, args.env, seed, args.steps, options)]
        with args.csv.open("a", newline="") as file:
            csv.writer(file).writerows(new)
        rows += new
        print(args.env, name, seed, [row[4] for row in new], flush=True)
    curves: dict = defaultdict(lambda: defaultdict(list))
    for env_id, name, _, step, value in rows:
        if env_id == args.env:
            curves[name][int(step)].append(float(value))
    plt.figure(figsize=(8, 6), layout="constrained")
    for name, points in curves.items():
        x = sorted(points)
        mean = np.array([np.mean(points[t]) for t in x])
        plt.plot(x, mean, marker="o", label=f"{name} (seeds: {len(points[x[-1]])})")
        plt.fill_between(x, [min(points[t]) for t in x], [max(points[t]) for t in x], alpha=0.2)
    plt.gca().set(xlabel="environment steps", ylabel="return (deterministic)", title=args.env)
    plt.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    plt.savefig(args.csv.with_name(f"online_{args.env}.png"), dpi=120)
