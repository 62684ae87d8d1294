"""
CPU time per environment step on Hopper, SAC and arms of CPQL in turn: python online_cost.py 9 SAC CPQL CPQL,compile=1 CPQL,ent_coef=0

An arm is CPQL and its changes, joined by commas: arch=2x256, act=ReLU, compile=1, or a constructor's argument.
"""

import statistics
import sys
import time

import torch as th
from stable_baselines3 import SAC
from torch import nn

from sb3_consistency import CPQL

th.set_num_threads(1)


def make(name):
    kwargs, policy = {"seed": 0, "device": "cpu"}, {}
    if name == "SAC":
        return SAC("MlpPolicy", "Hopper-v5", **kwargs)
    for change in name.split(",")[1:]:
        key, value = change.split("=")
        if key == "arch":
            depth, width = map(int, value.split("x"))
            policy["net_arch"] = [width] * depth
        elif key == "act":
            policy["activation_fn"] = getattr(nn, value)
        else:
            kwargs[key] = value if key == "actor_q" else eval(value)
    return CPQL("MlpPolicy", "Hopper-v5", **kwargs, policy_kwargs=policy)


rounds, names = int(sys.argv[1]), sys.argv[2:]
models = {name: make(name).learn(400) for name in names}
times = {name: [] for name in names}
for _ in range(rounds):
    for name in names:
        start = time.process_time()
        models[name].learn(100, reset_num_timesteps=False)
        times[name].append((time.process_time() - start) * 10)
for name in names:
    ratio = statistics.median(a / b for a, b in zip(times[name], times["SAC"]))
    print(f"{name:45} {statistics.median(times[name]):.2f} ms, of SAC {ratio:.2f}")
