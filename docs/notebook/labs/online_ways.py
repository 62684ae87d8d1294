"""
Which good modes of the Ring CPQL keeps from scratch (networks 2x64): from the root of a checkout,

    python docs/notebook/labs/online_ways.py --steps 10000 --budget 0.5 --floor 0 --batch-size 128 --seed 0
"""

import argparse
import sys

import numpy as np
import torch as th

sys.path.insert(0, ".")
from sb3_consistency import CPQL
from sb3_consistency.training import temperature
from tests.test_temperature import Ring

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=10_000)
parser.add_argument("--budget", type=float, default=1.0, help="of the transport cost, per action dimension")
parser.add_argument("--floor", type=float, default=3e-4, help="of the temperature, in units of the mean value")
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

th.set_num_threads(1)
temperature.FLOOR = args.floor
options = {"learning_starts": 500, "policy_kwargs": {"net_arch": [64, 64]}, "device": "cpu", "target_entropy": -2 * args.budget}
model = CPQL("MlpPolicy", Ring(), seed=args.seed, batch_size=args.batch_size, **options).learn(args.steps)
actions, _ = model.predict(np.zeros((2000, 1), np.float32), deterministic=False)
distances = ((Ring.modes - actions[:, None]) ** 2).sum(2)
near, mode = distances.min(1) < 0.3**2, distances.argmin(1)
print("shares of the good modes", [round(float((near & (mode == k)).mean()), 3) for k in range(0, 8, 2)])
print("temperature", float(model.ent_coef_tensor))
