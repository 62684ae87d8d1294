"""
Act with an exported policy: needs ONNX Runtime, NumPy and the environment; neither PyTorch nor Stable-Baselines3.

python -m sb3_consistency export --algo cpql --model quickstart/model.zip --output policy.onnx
python examples/03_onnx_control.py policy.onnx --env Pendulum-v1

A policy with a horizon gives whole chunks of actions: --executed-steps of each are executed, or, with --ensemble, every step
takes the mean of all chunks that reach it (temporal ensembling of ACT, Zhao et al. 2023).
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
parser.add_argument("--executed-steps", type=int, default=None, help="steps of a chunk that are executed; None for all")
parser.add_argument("--ensemble", action="store_true", help="choose a chunk at every step, and take the mean of all chunks")
parser.add_argument("--weight", type=float, default=0.01, help="of the mean: the i-th oldest chunk counts exp(-weight i)")
args = parser.parse_args()

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # a small network gains nothing from more
options.log_severity_level = 3
session = onnxruntime.InferenceSession(args.policy, options)
(seen,), (chosen,) = session.get_inputs(), session.get_outputs()
env = gym.make(args.env)
# the file's shapes tell the history (batch, h, ...) and the horizon (batch, H, ...)
history = seen.shape[1] if len(seen.shape) > len(env.observation_space.shape) + 1 else 1
horizon = chosen.shape[1] if chosen.name == "actions" else 1
executed = 1 if args.ensemble else args.executed_steps or horizon
returns, seconds, steps = [], [], 0


def choose_chunk(past: list[np.ndarray]) -> np.ndarray:
    """The next ``horizon`` actions, (H, ...)."""
    began = time.perf_counter()
    observations = np.stack(past) if history > 1 else past[-1]
    (actions,) = session.run([chosen.name], {seen.name: observations[None].astype(np.float32)})
    seconds.append(time.perf_counter() - began)
    return actions[0] if horizon > 1 else actions


for episode in range(args.episodes):
    observation, _ = env.reset(seed=episode)
    past = [observation] * history  # before an episode's first observation stands its first
    chunks: list[tuple[int, np.ndarray]] = []
    done, total, step = False, 0.0, 0
    while not done:
        if step % executed == 0:
            kept = [(made, chunk) for made, chunk in chunks if step - made < horizon] if args.ensemble else []
            chunks = [*kept, (step, choose_chunk(past))]
        weights = np.exp(-args.weight * np.arange(len(chunks)))
        action = np.tensordot(weights / weights.sum(), [chunk[step - made] for made, chunk in chunks], 1)
        observation, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        past, steps = [*past[1:], observation], steps + 1
        done, total, step = terminated or truncated, total + float(reward), step + 1
    returns.append(total)
assert sys.modules.get("torch") is None
print(
    f"mean return {np.mean(returns):.0f} of {args.episodes} episodes, {1e6 * np.median(seconds):.0f} us per network pass, "
    f"{1e6 * sum(seconds) / steps:.0f} us per step"
)
