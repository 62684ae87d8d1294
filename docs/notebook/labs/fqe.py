"""
Does fitted Q evaluation rank policies as their true returns do? One training run, judged both ways at several steps.

    python docs/notebook/labs/fqe.py run --data zoo/hopper/mixed-v0 --algo CPQL --options "{'eta': 1.0}"
    python docs/notebook/labs/fqe.py table

Rows go to fqe.jsonl (--file); the table has Spearman's rank correlation per dataset, over all runs and steps.
"""

import argparse
import json
from ast import literal_eval
from pathlib import Path

import numpy as np
import pandas as pd
import torch as th
from scipy.stats import spearmanr
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_consistency

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["run", "table"])
parser.add_argument("--data")
parser.add_argument("--algo", default="CPQL")
parser.add_argument("--options", default="{}")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, nargs="+", default=[1000, 2000, 4000, 8000])
parser.add_argument("--fqe-steps", type=int, default=5000)
parser.add_argument("--episodes", type=int, default=10)
parser.add_argument("--file", type=Path, default=Path("fqe.jsonl"))
args = parser.parse_args()

if args.what == "table":
    for data, rows in pd.read_json(args.file, lines=True).groupby("data"):
        rho, p = spearmanr(rows["fqe"], rows["return"])
        print(f"{data}: Spearman {rho:.2f} (p {p:.3f}), {len(rows)} policies of {rows['run'].nunique()} runs; data {rows['behaviour'].iloc[0]:.0f}")
    raise SystemExit

th.set_num_threads(1)
options = literal_eval(args.options)
model = getattr(sb3_consistency, args.algo).from_dataset(
    args.data, seed=args.seed, dataset_kwargs={"heldout_fraction": 0.1}, device="cpu", **options
)
source = sb3_consistency.open_dataset(args.data)
env = make_vec_env(lambda: sb3_consistency.make_env(source.make_env()), n_envs=args.episodes)
done = 0
for step in args.steps:
    # the learning rates fall to 0 at every step that is judged: each is a policy as a run of this length leaves it
    getattr(model, "learn" if model.offline_only else "pretrain")(
        step - done, **({"reset_num_timesteps": False} if model.offline_only else {})
    )
    done = step
    env.seed(1000 + args.seed)
    returns, _ = evaluate_policy(model, env, args.episodes, True, return_episode_rewards=True)
    fqe = sb3_consistency.fitted_q_evaluation(model, args.fqe_steps)
    run = f"{args.algo} {args.options} {args.seed}"
    row = {"data": args.data, "run": run, "step": step, "fqe": fqe, "return": float(np.mean(returns))}
    row |= {"behaviour": float(source.returns.mean()), "fqe_steps": args.fqe_steps, "episodes": args.episodes}
    print(row, flush=True)
    with args.file.open("a") as file:
        file.write(json.dumps(row) + "\n")
