"""
Act with an exported policy: needs ONNX Runtime, NumPy and the environment; neither PyTorch nor Stable-Baselines3.

python -m sb3_consistency export --algo cpql --model quickstart/model.zip --output policy.onnx
python examples/03_onnx_control.py policy.onnx --env Pendulum-v1
"""

import argparse
import sys
import time

import gymnasium as gym
import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("policy", help="file written by export")
parser.add_argument("--env", default="Pendulum-v1", help="environment to act in")
parser.add_argument("--episodes", type=int, default=10, help="episodes to run")
args = parser.parse_args()

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # a small network gains nothing from more
options.log_severity_level = 3
session = onnxruntime.InferenceSession(args.policy, options)
env = gym.make(args.env)
returns, seconds = [], []
for episode in range(args.episodes):
    observation, _ = env.reset(seed=episode)
    done, total = False, 0.0
    while not done:
        began = time.perf_counter()
        (action,) = session.run(["action"], {"observation": observation[None].astype(np.float32)})
        seconds.append(time.perf_counter() - began)
        observation, reward, terminated, truncated, _ = env.step(action[0])
        done, total = terminated or truncated, total + float(reward)
    returns.append(total)
assert sys.modules.get("torch") is None
print(f"mean return {np.mean(returns):.0f} of {args.episodes} episodes, {1e6 * np.median(seconds):.0f} us per action")
