# %% [markdown]
"""
# Two ways around an obstacle

One way is better rewarded: a teacher, its student without rewards, and RACTD. Draws a PNG.
"""

# %%
import argparse
import ast
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from gymnasium import spaces

from sb3_consistency import RACTD
from sb3_consistency.registry import colour_of

HORIZON, SPEED = 16, 0.1
ABOUT = "One way is better rewarded: a teacher, its student without rewards, and RACTD. Draws a PNG."
parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--steps", type=int, default=4_000, help="gradient steps of each teacher, reward model and student")
parser.add_argument("--students", nargs="*", default=[], help="options of more students, texts of dicts; they are not drawn")
parser.add_argument("--png", type=Path, default=Path("planner_modes.png"), help="picture to draw")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has the defaults

# %% [markdown]
# ## The data


# %%
def demonstrations(n: int, rng: np.random.Generator) -> dict:
    """Half of the paths lead over the obstacle (reward 1 per step), half below it (reward 0.5)."""
    side = rng.choice([1, -1], size=n)
    angle = side[:, None] * np.linspace(1.1, -1.1, HORIZON) + 0.15 * rng.standard_normal((n, 1))
    actions = 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=-1) + 0.05 * rng.standard_normal((n, HORIZON, 2))
    positions = np.concatenate([np.zeros((n, 1, 2)), SPEED * actions.cumsum(axis=1)], axis=1)
    ends = np.tile(np.arange(HORIZON) == HORIZON - 1, n)
    return {
        "observations": positions[:, :-1].reshape(-1, 2).astype(np.float32),
        "next_observations": positions[:, 1:].reshape(-1, 2).astype(np.float32),
        "actions": actions.reshape(-1, 2).astype(np.float32),
        "rewards": np.repeat(0.75 + 0.25 * side, HORIZON).astype(np.float32),
        "terminations": ends,
        "truncations": np.zeros_like(ends),
        "action_space": spaces.Box(-1, 1, (2,), np.float32),
    }


# %% [markdown]
# ## A teacher and its students
#
# Each plans windows of 16 actions. The agent executes a quarter of a plan, and plans again.


# %%
def walk(planner: Callable[[np.ndarray], np.ndarray], n: int = 300) -> np.ndarray:
    """Paths (n, H + 1, 2) of an agent that plans, executes a quarter of the plan, and plans again."""
    path = np.zeros((n, 1, 2), np.float32)
    for _ in range(4):
        moves = SPEED * planner(path[:, -1])[:, : HORIZON // 4]
        path = np.concatenate([path, path[:, -1:] + moves.cumsum(axis=1)], axis=1)
    return path


def describe(paths: np.ndarray, data: np.ndarray) -> str:
    """How many paths lead each way, and how far from those of the data they end."""
    height = paths[:, HORIZON // 2, 1]
    off = np.linalg.norm(paths[:, None, -1] - data[:, -1], axis=-1).min(axis=1).mean()
    shares = [100 * (height > 0.15).mean(), 100 * (height < -0.15).mean()]
    return f"{shares[0]:.0f} % above (better), {shares[1]:.0f} % below, ends {off:.2f} off"


options = {"dataset": demonstrations(2000, np.random.default_rng(0)), "horizon": HORIZON, "seed": 0}
teacher = RACTD("MlpPolicy", teacher_steps=args.steps, **options).pretrain(args.steps, progress_bar=True)
with tempfile.TemporaryDirectory() as folder:
    teacher.save(options.setdefault("teacher", f"{folder}/teacher.zip"))

    def student(**own) -> np.ndarray:
        # a hasty reward model is what the student exploits first
        own = {"reward_horizon": HORIZON, "reward_steps": 0.5, **own}
        return walk(RACTD("MlpPolicy", **options, **own).pretrain(2 * args.steps, progress_bar=True).plan)

    walks = {
        "data": options["dataset"]["observations"].reshape(-1, HORIZON, 2)[:300],
        "teacher, 158 passes": walk(teacher.teacher_plan),
        "student without rewards, 1 pass": student(reward_weight=0.0),
        "RACTD, 1 pass": student(),
    }
    others = {text: student(**ast.literal_eval(text)) for text in args.students}

# %% [markdown]
# ## Which way do they take?

# %%
for name, paths in {**walks, **others}.items():
    print(f"{name}: {describe(paths, walks['data'])}")
figure, axes = plt.subplots(1, 4, figsize=(12, 4.4), sharex=True, sharey=True, layout="constrained")
for axis, (name, paths) in zip(axes, walks.items(), strict=True):
    axis.plot(*paths.transpose(2, 1, 0), color=colour_of(name), linewidth=0.5, alpha=0.3)
    axis.add_patch(plt.Circle((0.45, 0), 0.12, color="0.6"))
    axis.set(title=f"{name}\n{describe(paths, walks['data']).rsplit(',', 1)[0]}", aspect="equal")
figure.savefig(args.png, dpi=120)
