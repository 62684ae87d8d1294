# %% [markdown]
"""
# Eight modes on a ring

What generative policies and a Gaussian policy learn from the same data. Draws a PNG.

Eight actions are equally good. A policy that keeps them apart puts its samples on the eight; one that doesn't, between them.
"""

# %%
import argparse
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from gymnasium import spaces

import sb3_consistency
from sb3_consistency.registry import colour_of

MODES = 0.8 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
STD = 0.1
# samples of the policy itself, not of what critics choose from it
ONE = {"n_candidates": 1}
POLICIES = {
    "ConsistencyBC": ("ConsistencyBC", {}),
    "ConsistencyAC": ("ConsistencyAC", ONE),
    "CPQL": ("CPQL", ONE),
    "CPQL-ict": ("CPQL", {**ONE, "bc_loss": "ict"}),
    "CPQL-distill": ("CPQL", {**ONE, "bc_loss": "distill"}),
    "DiffusionBC": ("DiffusionBC", {}),
    "DiffusionQL": ("DiffusionQL", ONE),
}
ABOUT = "What generative policies and a Gaussian policy learn from the same data. Draws a PNG."
parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--steps", type=int, default=20_000, help="gradient steps of each algorithm")
parser.add_argument("--algos", nargs="+", default=["ConsistencyBC"], choices=POLICIES, help="what to train")
parser.add_argument("--bonus", type=float, default=0.0, help="how much more the reward, else 1, is at every second mode")
parser.add_argument("--seed", type=int, default=0, help="seed of data and training")
parser.add_argument("--options", type=literal_eval, default={}, help="further arguments of the algorithms, as a dict")
parser.add_argument("--compile", action="store_true", help="compile the losses (needs a C++ compiler)")
parser.add_argument("--png", type=Path, default=Path("multimodality.png"), help="picture to draw")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has the defaults
th.set_num_threads(1)
rng = np.random.default_rng(1)

# %% [markdown]
# ## The data
#
# One observation, and actions around eight points.


# %%
def ring(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Actions, and the numbers of their modes."""
    modes = rng.integers(8, size=n)
    return np.clip(MODES[modes] + STD * rng.standard_normal((n, 2)), -1, 1), modes


def coverage(actions: np.ndarray) -> tuple[int, float]:
    """Number of modes with more than 1 % of the samples, and the share of samples within 3 standard deviations of a mode."""
    distances = np.linalg.norm(actions[:, None] - MODES, axis=2)
    near = distances.min(axis=1) < 3 * STD
    counts = np.bincount(distances.argmin(axis=1)[near], minlength=8)
    return int((counts > 0.01 * len(actions)).sum()), float(near.mean())


def near_good(actions: np.ndarray) -> float:
    """Share of the samples that is within 3 standard deviations of one of the modes with an even number."""
    return float((np.linalg.norm(actions[:, None] - MODES[::2], axis=2).min(axis=1) < 3 * STD).mean())


data, _ = ring(4000, rng)
panels, best = {"data": data}, {}

# %% [markdown]
# ## Training
#
# All actions get the same reward, unless there is a bonus: the critics have nothing to choose from.


# %%
def train(algo: str, steps: int, seed: int = 0, bonus: float = 0.0, **options) -> Any:
    actions, modes = ring(20_000, np.random.default_rng(seed))
    n = len(actions)
    data = {
        "observations": np.zeros((n, 1), np.float32),
        "next_observations": np.zeros((n, 1), np.float32),
        "actions": actions.astype(np.float32),
        # without any reward the critics would be noise, and the normalised Q term follow it
        "rewards": (1 + bonus * (modes % 2 == 0)).astype(np.float32),
        "terminations": np.ones(n, bool),
        "truncations": np.zeros(n, bool),
        "action_space": spaces.Box(-1, 1, (2,), np.float32),
    }
    model: Any = getattr(sb3_consistency, algo)("MlpPolicy", dataset=data, seed=seed, **options)
    return model.pretrain(steps, progress_bar=True)


for name in args.algos:
    algo, options = POLICIES[name]
    given = {"seed": args.seed, "bonus": args.bonus, "compile": args.compile, **options, **args.options}
    model = train(algo, args.steps, **given)
    passes = model.policy.actor.model.noise_shape(1)[0]
    name = f"{name}, {passes} pass{'es' * (passes > 1)}"
    panels[name], _ = model.predict(np.zeros((4000, 1), np.float32))
    best[name] = model.predict(np.zeros(1, np.float32), deterministic=True)[0]
panels["Gaussian policy"] = np.clip(rng.multivariate_normal(data.mean(0), np.cov(data.T), 4000), -1, 1)

# %% [markdown]
# ## Which modes are kept?

# %%
columns = 3 if len(panels) % 3 == 0 else min(len(panels), 4)
rows = -(-len(panels) // columns)
figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.7 * rows), squeeze=False, layout="constrained")
for axis in axes.flat[len(panels) :]:
    axis.remove()
for axis, (name, points) in zip(axes.flat, panels.items(), strict=False):
    modes, near = coverage(points)
    told = f"{name}: {modes} of 8 modes, {100 * near:.1f} % of the samples within 3 standard deviations of a mode"
    told += f", {100 * near_good(points):.1f} % of one with an even number"
    if name in best:
        distances = np.linalg.norm(MODES - best[name], axis=1)
        told += f"; deterministic: {distances.min() / STD:.1f} standard deviations from mode {distances.argmin()}"
    print(told)
    axis.scatter(*points.T, s=2, alpha=0.4, color=colour_of(name))
    axis.set(
        aspect="equal",
        xlim=(-1.1, 1.1),
        ylim=(-1.1, 1.1),
    )
    axis.set_title(f"{name}\n{modes} of 8 modes, {100 * near:.0f} % near a mode", fontsize="medium")
figure.savefig(args.png, dpi=120)
