"""Eight modes on a ring: what generative policies and a Gaussian policy learn from the same data. Draws a PNG."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from gymnasium import spaces

import sb3_consistency

MODES = 0.8 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
STD = 0.1
# samples of the policy itself, not of what critics choose from it
ONE = {"n_candidates": 1}
POLICIES = {
    "ConsistencyBC": ("ConsistencyBC", {}),
    "ConsistencyAC": ("ConsistencyAC", ONE),
    "CPQL": ("CPQL", ONE),
    "CPQL-ict": ("CPQL", {**ONE, "bc_loss": "ict"}),
    "DiffusionBC": ("DiffusionBC", {}),
    "DiffusionQL": ("DiffusionQL", ONE),
}


def ring(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.clip(MODES[rng.integers(8, size=n)] + STD * rng.standard_normal((n, 2)), -1, 1)


def coverage(actions: np.ndarray) -> tuple[int, float]:
    """Number of modes with more than 1 % of the samples, and the share of samples within 3 standard deviations of a mode."""
    distances = np.linalg.norm(actions[:, None] - MODES, axis=2)
    near = distances.min(axis=1) < 3 * STD
    counts = np.bincount(distances.argmin(axis=1)[near], minlength=8)
    return int((counts > 0.01 * len(actions)).sum()), float(near.mean())


def train(algo: str, steps: int, seed: int = 0, **options) -> Any:
    actions = ring(20_000, np.random.default_rng(seed)).astype(np.float32)
    n = len(actions)
    data = {
        "observations": np.zeros((n, 1), np.float32),
        "next_observations": np.zeros((n, 1), np.float32),
        "actions": actions,
        # equally good; without any reward the critics would be noise, and the normalised Q term follow it
        "rewards": np.ones(n, np.float32),
        "terminations": np.ones(n, bool),
        "truncations": np.zeros(n, bool),
        "action_space": spaces.Box(-1, 1, (2,), np.float32),
    }
    model: Any = getattr(sb3_consistency, algo)("MlpPolicy", dataset=data, seed=seed, **options)
    return model.pretrain(steps, progress_bar=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="gradient steps of each algorithm")
    parser.add_argument("--algos", nargs="+", default=["ConsistencyBC"], choices=POLICIES, help="what to train")
    parser.add_argument("--compile", action="store_true", help="compile the losses (needs a C++ compiler)")
    parser.add_argument("--png", type=Path, default=Path("multimodality.png"), help="picture to draw")
    args = parser.parse_args()
    th.set_num_threads(1)
    rng = np.random.default_rng(1)
    data = ring(4000, rng)
    panels = {"data": data}
    for name in args.algos:
        algo, options = POLICIES[name]
        model = train(algo, args.steps, compile=args.compile, **options)
        passes = model.policy.actor.model.noise_shape(1)[0]
        panels[f"{name}, {passes} pass{'es' * (passes > 1)}"], _ = model.predict(np.zeros((4000, 1), np.float32))
    panels["Gaussian policy"] = np.clip(rng.multivariate_normal(data.mean(0), np.cov(data.T), 4000), -1, 1)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, points) in zip(axes.flat, panels.items(), strict=False):
        modes, near = coverage(points)
        print(f"{name}: {modes} of 8 modes, {100 * near:.1f} % of the samples within 3 standard deviations of a mode")
        axis.scatter(*points.T, s=2, alpha=0.4)
        axis.set(
            title=f"{name}\n{modes} of 8 modes, {100 * near:.0f} % near a mode",
            aspect="equal",
            xlim=(-1.1, 1.1),
            ylim=(-1.1, 1.1),
        )
    figure.savefig(args.png, dpi=120)
