"""
Does a policy that is learned online from scratch keep several ways? The tests' two tasks, with any options and seed.

    python docs/notebook/labs/several_ways.py goals --seed 1 --options "{'shift_cost': 0.5}"
    python docs/notebook/labs/several_ways.py ring --steps 5000
    python docs/notebook/labs/several_ways.py pendulum --steps 8000
"""

import argparse
import sys
from ast import literal_eval
from pathlib import Path

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.test_temperature import CPQL, Ring, TwoGoals, several_ways, shares_of_goals, shares_of_modes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("task", choices=["goals", "ring", "pendulum"])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--options", type=literal_eval, default={}, help="arguments of CPQL, as a dict")
args = parser.parse_args()
th.set_num_threads(1)
options = {"seed": args.seed, **args.options}

if args.task == "pendulum":
    model = CPQL("MlpPolicy", "Pendulum-v1", **options)
    envs = make_vec_env("Pendulum-v1", n_envs=20)
    for part in range(5):
        model.learn(args.steps // 5, reset_num_timesteps=part == 0)
        envs.seed(1000)
        mean = evaluate_policy(model, envs, 20)[0]
        print(f"{model.num_timesteps} steps: {mean:.1f}, temperature {float(model.ent_coef_tensor):.2f}", flush=True)
elif args.task == "goals":
    left, right, mean = shares_of_goals(several_ways(TwoGoals(), args.steps, **options))
    print(f"left {left:.2f}, right {right:.2f}, return {mean:.2f}")
else:
    print("shares:", *(f"{share:.2f}" for share in shares_of_modes(several_ways(Ring(), args.steps, **options))))
