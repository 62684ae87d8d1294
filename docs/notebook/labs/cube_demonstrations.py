"""
Demonstrations of one task of OGBench's cube, by its scripted controller that follows a plan made at the start (`pip install ogbench`).

    MINARI_DATASETS_PATH=... python docs/notebook/labs/cube_demonstrations.py --task 2 --steps 20000

writes the Minari dataset cube/task2-v0. The controller grips and releases by the clock: what it does next is no function of what is seen.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import ogbench  # noqa: F401  registers its environments
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

from sb3_consistency import record_dataset


class Demonstrator:
    """
    OGBench's controller as a function of the observation.

    :param env: where it acts
    :param noise: of its plan, in OGBench's units
    """

    def __init__(self, env: gym.Env, noise: float) -> None:
        self.world: Any = env.unwrapped
        self.controller = CubePlanOracle(env=env, noise=noise)
        self.starts = True

    def reset(self) -> None:
        self.starts = True

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        info = self.world.compute_ob_info()
        if self.starts:
            # told by the environment in the mode in which OGBench collects data only, which has no task
            place = self.world._cube_target_mocap_ids[0]
            quaternion = self.world._data.mocap_quat[place]
            told = {"block": 0, "block_pos": self.world._data.mocap_pos[place].copy()}
            told["block_yaw"] = np.array([2 * np.arctan2(quaternion[3], quaternion[0])])
            self.controller.reset(observation, info | {f"privileged/target_{key}": value for key, value in told.items()})
            self.starts = False
        return np.clip(self.controller.select_action(observation, info), -1, 1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=int, default=2, help="number of the task, 1 to 5")
    parser.add_argument("--steps", type=int, default=20_000, help="steps to record")
    parser.add_argument("--dataset-id", default=None, help="default: cube/task<number>-v0")
    parser.add_argument("--noise", type=float, default=0.1, help="of the plan")
    args = parser.parse_args()
    np.random.seed(0)
    env = gym.make(f"cube-single-singletask-task{args.task}-v0")
    dataset_id = args.dataset_id or f"cube/task{args.task}-v0"
    dataset = record_dataset(dataset_id, env, Demonstrator(env, args.noise), args.steps, overwrite=True)
    episodes = list(dataset.iterate_episodes())
    successes = [bool(episode.terminations[-1]) for episode in episodes[:-1]]
    print(f"{len(successes)} episodes, {np.mean(successes):.0%} reach the goal, {len(episodes[0].actions)} steps in the first")


if __name__ == "__main__":
    main()
