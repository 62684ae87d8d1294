# %% [markdown]
"""
# Through a maze in one pass

Plan through a maze in one network pass and track the plan: goals reached per 2000 steps, and a PNG of plans and paths.
"""

# %%
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import minari
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_consistency import RACTD

ABOUT = "Plan through a maze in one network pass and track the plan. Draws a PNG."
parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--dataset", default="D4RL/pointmaze/umaze-v2", help="Minari dataset of a PointMaze")
parser.add_argument("--horizon", type=int, default=32, help="states of a plan")
parser.add_argument("--stride", type=int, default=4, help="environment steps from one to the next")
parser.add_argument("--steps", type=int, default=40_000, help="gradient steps in all")
parser.add_argument("--compile", action="store_true", help="compile the losses")
parser.add_argument("--walk", type=int, default=2000, help="environment steps of an evaluation")
parser.add_argument("--png", type=Path, default=Path("maze.png"), help="picture to draw")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has the defaults

# %% [markdown]
# ## A planner of states

# %%
data = minari.load_dataset(args.dataset, download=True)
model = RACTD.from_dataset(
    data,
    plan_of="states",
    horizon=args.horizon,
    stride=args.stride,
    executed_steps=min(32, (args.horizon - 1) * args.stride),
    tracking_gains=(20.0, 2.0),
    reward_weight=0.0,
    reward_steps=0,
    compile=args.compile,
    seed=0,
)
model.pretrain(args.steps, progress_bar=True)

# %% [markdown]
# ## Goals reached


# %%
def walk(model: RACTD, env: VecEnv, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Goals reached in each environment, and the paths (steps, n_envs, 2)."""
    env.seed(1000)
    obs, state = env.reset(), None
    start, reached, path = np.ones(env.num_envs, bool), np.zeros(env.num_envs), []
    for _ in range(steps):
        path.append(obs["observation"][:, :2])
        # sampled, not deterministic: where one plan leads into a wall, the next may lead past it
        action, state = model.predict(obs, state, start)
        obs, reward, start, _ = env.step(action)
        reached += reward
    return reached, np.stack(path)


env = make_vec_env(lambda: data.recover_environment(), n_envs=10)
rewards = np.concatenate([episode.rewards for episode in data.iterate_episodes()])
goals = {"controller of the data": 2000 * rewards.mean()}
for name, network, steps in [("student, 1 pass", "student", 1), ("teacher, 20 passes", "teacher", 10)]:
    with model.planning_with(network, steps):
        reached, path = walk(model, env, args.walk)
    goals[name] = 2000 / args.walk * reached.mean()
    if network == "student":
        paths = path
print("Goals per 2000 steps, mean of 10 environments:")
for name, number in goals.items():
    print(f"- {name}: {number:.1f}")

# %% [markdown]
# ## Plans and paths


# %%
def draw(axis: plt.Axes, env: VecEnv) -> None:
    maze = env.envs[0].unwrapped.maze
    for row, cells in enumerate(maze.maze_map):
        for column, cell in enumerate(cells):
            if cell == 1:
                corner = maze.cell_rowcol_to_xy(np.array([row, column])) - maze.maze_size_scaling / 2
                axis.add_patch(plt.Rectangle(corner, maze.maze_size_scaling, maze.maze_size_scaling, color="0.8"))
    axis.set(aspect="equal")
    axis.autoscale_view()


env.seed(1000)
obs = env.reset()
planners = {"plans of the student, 1 pass": model.plan, "plans of the teacher, 158 passes": model.teacher_plan}
figure, axes = plt.subplots(1, 3, figsize=(13, 5.2), sharex=True, sharey=True, layout="constrained")
for axis, (title, planner) in zip(axes, planners.items(), strict=False):
    draw(axis, env)
    for i in range(6):
        plans = planner({name: value[i : i + 1].repeat(8, axis=0) for name, value in obs.items()})
        axis.plot(*plans[..., :2].transpose(2, 1, 0), color=f"C{i}", linewidth=0.7)
        axis.plot(*obs["observation"][i, :2], "o", color=f"C{i}")
        axis.plot(*obs["desired_goal"][i], "*", color=f"C{i}", markersize=12)
    axis.set(title=title + "\n(8 per start, to the star)")
draw(axes[2], env)
axes[2].plot(*paths[:300, :6].transpose(2, 0, 1), linewidth=0.7)
axes[2].set(title="300 steps that track the student's plans")
figure.savefig(args.png, dpi=120)
print(f"Drawn to {args.png}.")
