# %% [markdown]
"""
# Quickstart

Record behaviour on Pendulum, learn from it offline, improve online, export the policy. `make quickstart` runs this script.

One to two minutes on two cores. Everything it makes is in the folder `quickstart`: data.npz, model.zip, policy.onnx,
learning_curve.png and log.txt.
"""

# %%
import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_consistency import CPQL

ENV = "Pendulum-v1"
KEYS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
ABOUT = "Record behaviour on Pendulum, learn from it offline, improve online, export the policy."
parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="where to write")
parser.add_argument("--steps", type=int, default=4_000, help="gradient steps offline, and environment steps online")
parser.add_argument("--seed", type=int, default=0, help="seed of the model")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has the defaults
args.folder.mkdir(parents=True, exist_ok=True)
warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # PyTorch's exporter, of itself
th.set_num_threads(1)  # such small networks gain nothing from more


# %% [markdown]
# A callback evaluates every now and then: one line on the screen and in the log file each time.


# %%
class Progress(BaseCallback):
    def __init__(self, every: int, folder: Path) -> None:
        super().__init__()
        self.every, self.began = every, time.perf_counter()
        self.log = (folder / "log.txt").open("w")
        self.env = make_vec_env(ENV, n_envs=20, seed=1)
        self.phase, self.curves = "", {}

    def score(self, model: CPQL, episodes: int = 20) -> float:
        self.env.seed(1)  # the same starts each time
        return float(np.mean(evaluate_policy(model, self.env, episodes)[0]))

    def say(self, text: str) -> None:
        line = f"{time.perf_counter() - self.began:4.0f} s  {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def _on_step(self) -> bool:
        if self.n_calls % self.every == 0:
            self.curves.setdefault(self.phase, []).append((self.num_timesteps, self.score(self.model)))
            step, value = self.curves[self.phase][-1]
            self.say(f"{self.phase}, step {step:5,}: mean return {value:5.0f}")
        return True


progress = Progress(max(args.steps // 12, 1), args.folder)

# %% [markdown]
# ## Record
#
# Three controllers, one good and two bad, swing the pendulum up. What they did becomes the arrays that a `dataset` has.


# %%
def swing_up(observation: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A controller as an engineer might have it: pump energy until the pendulum stands, then balance. Noise makes it worse."""
    cos, sin, velocity = observation
    angle, energy = np.arctan2(sin, cos), velocity**2 / 6 + 5 * (cos - 1)
    torque = -12 * angle - 3 * velocity if abs(angle) < 0.5 else -0.6 * np.sign(velocity + 1e-3) * energy
    return np.clip([torque + noise * rng.standard_normal()], -2, 2).astype(np.float32)


def record(episodes: int) -> dict[str, np.ndarray]:
    """What three controllers did, one good and two bad ones."""
    env, rng, rows = gym.make(ENV), np.random.default_rng(0), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = swing_up(observation, noise=(1, 4, 8)[episode % 3], rng=rng)
            after, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, np.float32(reward), after, terminated, truncated))
            observation, ended = after, terminated or truncated
    return {key: np.array(column) for key, column in zip(KEYS, zip(*rows, strict=True), strict=True)}


data = record(episodes=max(args.steps // 50, 3))
np.savez(args.folder / "data.npz", **data)
behaviour = float(data["rewards"].sum() / data["truncations"].sum())
progress.say(f"recorded {len(data['rewards']):,} steps of three controllers: mean return {behaviour:5.0f}")

# %% [markdown]
# ## Learn offline
#
# Small networks and a short horizon, because the task is small; the rest are the defaults. The model never steps in the
# environment here, but for its evaluations.

# %%
model = CPQL(
    "MlpPolicy",
    ENV,
    dataset=str(args.folder / "data.npz"),
    learning_rate=1e-3,
    batch_size=128,
    gamma=0.98,
    cosine_lr_decay=True,  # online, too: the run ends settled
    policy_kwargs={"net_arch": [128, 128]},
    seed=args.seed,
)
returns = {"behaviour in the data": behaviour}

progress.phase = "offline"
model.pretrain(args.steps, callback=progress)
returns[f"after {args.steps:,} gradient steps on it"] = progress.score(model, 100)

# %% [markdown]
# ## Improve online
#
# Online the critics may leave the behaviour behind: little cloning, half of every batch from the data.

# %%
progress.phase = "online"
model.alpha, model.offline_fraction = 0.1, 0.5
model.learn(args.steps, callback=progress)
returns[f"after {args.steps:,} steps in the environment"] = progress.score(model, 100)
model.save(args.folder / "model")


# %%
def draw(curves: dict[str, list[tuple[int, float]]], behaviour: float) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    offset, first = 0, True
    for (phase, curve), color in zip(curves.items(), ("#0072b2", "#d55e00"), strict=True):
        steps, values = np.array(curve).T
        axis.plot(steps + offset, values, color=color, linewidth=2)
        axis.annotate(phase, (steps[0] + offset, values.max()), xytext=(0, 8), textcoords="offset points", color=color)
        offset += int(steps[-1])
        if first:
            axis.axvline(offset, color="0.6", linewidth=1)
        first = False
    axis.axhline(behaviour, color="0.4", linestyle="--", linewidth=1)
    axis.annotate("the data's mean return", (offset, behaviour), xytext=(0, -12), ha="right", textcoords="offset points")
    axis.set(
        xlabel="gradient steps on the data, then steps in the environment", ylabel="mean return of 20 episodes", title=ENV
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.15)
    return figure


draw(progress.curves, behaviour).savefig(args.folder / "learning_curve.png", dpi=120)

# %% [markdown]
# ## Export
#
# The policy becomes an ONNX file. Another process acts with it, without PyTorch.

# %%
model.export(str(args.folder / "policy.onnx"))
examples = Path(__file__).parent if "__file__" in globals() else Path()
command = [sys.executable, str(examples / "03_onnx_control.py"), str(args.folder / "policy.onnx"), "--env", ENV]
acted = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
progress.say(f"exported policy, acting without PyTorch: {acted}")

table = ["", f"| {ENV} | mean return |", "|---|---|", *(f"| {name} | {value:.0f} |" for name, value in returns.items())]
print(*table, sep="\n")
print(*table, sep="\n", file=progress.log, flush=True)
print(f"\nData, model, exported policy, learning curve and log are in {args.folder}")
print(
    "\nThe same with your environment and your data:\n\n"
    '    model = CPQL("MlpPolicy", env, dataset="data.npz", pretrain_steps=100_000)\n'
    "    model.learn(100_000)\n"
    '    model.export("policy.onnx")'
)
