"""
Files that robomimic's own writer makes, and what its own reader gets out of them.

Run by an interpreter that has robomimic: ``python robomimic_files.py FOLDER`` writes ``<name>.hdf5`` and ``<name>.npz``.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import h5py
import numpy as np
import robomimic.utils.env_utils as EnvUtils
from robomimic.envs.env_base import EnvBase, EnvType
from robomimic.scripts.dataset_states_to_obs import dataset_states_to_obs
from robomimic.scripts.split_train_val import split_train_val_from_hdf5
from robomimic.utils.dataset import SequenceDataset

KEYS = ("robot0_eef_pos", "object", "agentview_image")
#: name of a file -> options of robomimic's script dataset_states_to_obs.py
FILES = {
    "low_dim": {"done_mode": 0, "exclude_next_obs": False, "compress": False},
    "no_next_obs": {"done_mode": 2, "exclude_next_obs": True, "compress": True},
}


class Cart(EnvBase):
    """A cart on a line, its state (position, goal); within 0.5 of the goal is a success."""

    def __init__(self, **kwargs):
        self.state = np.zeros(2)

    def reset(self):
        self.state = np.array([0.0, 2.0])
        return self.get_observation()

    def reset_to(self, state):
        self.state = np.array(state["states"])
        return self.get_observation()

    def step(self, action):
        self.state = self.state + np.array([action[0], 0.0])
        return self.get_observation(), self.get_reward(), self.is_done(), {}

    def get_observation(self):
        position, goal = self.state
        image = np.full((4, 4, 3), int(50 + 20 * position), np.uint8)
        return {"robot0_eef_pos": np.array([position, -position, 0.5]), "object": np.array([goal]), "agentview_image": image}

    def get_reward(self):
        return float(self.is_success()["task"])

    def is_success(self):
        return {"task": bool(abs(self.state[0] - self.state[1]) < 0.5)}

    def is_done(self):
        return False

    def get_state(self):
        return {"states": self.state}

    def get_goal(self):
        return {}

    def set_goal(self, **kwargs): ...

    def render(self, *args, **kwargs): ...

    def serialize(self):
        return {"env_name": self.name, "type": self.type, "env_kwargs": {}}

    @classmethod
    def create_for_data_processing(cls, *args, **kwargs):
        return cls()

    action_dimension, name, type, rollout_exceptions = 2, "Cart", EnvType.GYM_TYPE, ()


def record(path):
    """Demonstrations as they are collected: states and actions. Some succeed, one does not."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(Cart().serialize())
        for number, speed, length in ((2, 0.5, 5), (9, 0.3, 4), (10, 0.9, 3), (11, 1.0, 2)):
            actions = np.stack([np.full(length, speed), rng.uniform(-1, 1, length)], axis=1)
            positions = np.concatenate([[0.0], np.cumsum(actions[:-1, 0])])
            demo = data.create_group(f"demo_{number}")
            demo["states"], demo["actions"] = np.stack([positions, np.full(length, 2.0)], axis=1), actions
            demo.attrs["num_samples"] = length


def read(path, filter_key, with_next):
    """What robomimic trains on, demonstration by demonstration."""
    data = SequenceDataset(
        str(path), KEYS, ("actions", "rewards", "dones"), filter_by_attribute=filter_key, load_next_obs=with_next
    )
    got = [data.get_trajectory_at_index(index) for index in range(data.n_demos)]
    arrays = {key: np.concatenate([demo[key] for demo in got]) for key in ("actions", "rewards", "dones")}
    for group in ("obs", "next_obs")[: 1 + with_next]:
        arrays |= {f"{group}/{key}": np.concatenate([demo[group][key] for demo in got]) for key in KEYS}
    return {**arrays, "lengths": np.array([len(demo["actions"]) for demo in got]), "names": [demo["ep"] for demo in got]}


def main(folder):
    EnvUtils.create_env_for_data_processing = lambda **kwargs: Cart()
    raw = folder / "raw.hdf5"
    record(raw)
    np.random.seed(1)
    split_train_val_from_hdf5(str(raw), val_ratio=0.5)
    for name, options in FILES.items():
        dataset_states_to_obs(
            Namespace(
                **options,
                dataset=str(raw),
                output_name=f"{name}.hdf5",
                n=None,
                shaped=False,
                camera_names=[],
                camera_height=4,
                camera_width=4,
                copy_rewards=False,
                copy_dones=False,
            )
        )
        whole, train = (read(folder / f"{name}.hdf5", key, not options["exclude_next_obs"]) for key in (None, "train"))
        np.savez_compressed(folder / f"{name}.npz", **whole, **{f"train/{key}": value for key, value in train.items()})
    raw.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
