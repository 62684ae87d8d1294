"""Two ways around an obstacle, one better rewarded: a teacher, its student without rewards, and RACTD. Draws a PNG."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_consistency import RACTD

HORIZON, SPEED = 16, 0.1
REWARDS = {1: 1.0, -1: 0.5}  # above, below


def demonstrations(n: int, rng: np.random.Generator) -> dict:
    """Half of the paths lead over the obstacle, half below it; reward is per step."""
    side = rng.choice(list(REWARDS), size=n)
    angle = side[:, None] * np.linspace(1.1, -1.1, HORIZON) + 0.15 * rng.standard_normal((n, 1))
    actions = 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=-1) + 0.05 * rng.standard_normal((n, HORIZON, 2))
    positions = np.concatenate([np.zeros((n, 1, 2)), SPEED * actions.cumsum(axis=1)], axis=1)
    ends = np.tile(np.arange(HORIZON) == HORIZON - 1, n)
    return {
        "observations": positions[:, :-1].reshape(-1, 2).astype(np.float32),
        "next_observations": positions[:, 1:].reshape(-1, 2).astype(np.float32),
        "actions": actions.reshape(-1, 2).astype(np.float32),
        "rewards": np.repeat([REWARDS[s] for s in side], HORIZON).astype(np.float32),
        "terminations": ends,
        "truncations": np.zeros_like(ends),
        "action_space": spaces.Box(-1, 1, (2,), np.float32),
    }


def walk(planner: Callable[[np.ndarray], np.ndarray], n: int = 300) -> np.ndarray:
    """Paths (n, H + 1, 2) of an agent that plans, executes a quarter of the plan, and plans again."""
    paths = [np.zeros((n, 2), np.float32)]
    for step in range(HORIZON):
        if step % (HORIZON // 4) == 0:
            plans = planner(paths[-1])
        paths.append(paths[-1] + SPEED * plans[:, step % (HORIZON // 4)])
    return np.stack(paths, axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4_000, help="gradient steps of the teacher, and of each student")
    parser.add_argument("--png", type=Path, default=Path("planner_modes.png"))
    args = parser.parse_args()
    th.set_num_threads(1)
    data = demonstrations(2000, np.random.default_rng(0))
    options = {"dataset": data, "horizon": HORIZON, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        teacher = RACTD("MlpPolicy", teacher_steps=args.steps, **options).pretrain(args.steps, progress_bar=True)
        teacher.save(f"{folder}/teacher.zip")
        options["teacher"] = f"{folder}/teacher.zip"
        free = RACTD("MlpPolicy", reward_weight=0.0, reward_steps=0, **options).pretrain(args.steps, progress_bar=True)
        student = RACTD("MlpPolicy", **options).pretrain(args.steps, progress_bar=True)

    walks = {
        "data": data["observations"].reshape(-1, HORIZON, 2)[:300],
        "teacher, 158 passes": walk(teacher.teacher_plan),
        "student without rewards, 1 pass": walk(free.plan),
        "RACTD, 1 pass": walk(student.plan),
    }
    figure, axes = plt.subplots(1, len(walks), figsize=(14, 4), sharex=True, sharey=True, layout="constrained")
    for axis, (name, paths) in zip(axes, walks.items(), strict=True):
        height = paths[:, HORIZON // 2, 1]
        title = f"{name}\n{100 * (height > 0.15).mean():.0f} % above (better), {100 * (height < -0.15).mean():.0f} % below"
        print(title.replace("\n", ": "))
        axis.plot(*paths.transpose(2, 1, 0), color="tab:blue", linewidth=0.5, alpha=0.3)
        axis.add_patch(plt.Circle((0.45, 0), 0.12, color="tab:red"))
        axis.set(title=title, aspect="equal")
    figure.savefig(args.png, dpi=120)
