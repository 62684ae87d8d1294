"""D4RL's HDF5 files, with and without time-outs and next observations."""

from __future__ import annotations

import os
import re
from typing import TypeVar

import numpy as np

from sb3_consistency.data.checks import DatasetError, as_flags
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats import hdf5
from sb3_consistency.data.mapping import read_mapping

T = TypeVar("T")

# Source: D4RL, d4rl/infos.py: returns of a random and of an expert policy
REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
}
# Source: D4RL's registrations of its environments: their time limits, which cut files without "timeouts" into episodes
TIME_LIMITS = {
    "halfcheetah": 1000,
    "hopper": 1000,
    "walker2d": 1000,
    "ant": 1000,
    "antmaze-umaze": 700,
    "antmaze": 1000,
    "maze2d-open": 150,
    "maze2d-umaze": 300,
    "maze2d-medium": 600,
    "maze2d-large": 800,
    "kitchen": 280,
    "pen": 100,
    "hammer": 200,
    "door": 200,
    "relocate": 200,
}


def open_d4rl(path: str, max_episode_steps: str | None = None) -> FlatSource:
    """
    Read a file of D4RL: steps of all episodes one after the other, without the observation after an episode's last step.

    With ``next_observations`` all steps are kept. Without, a step that times out has no successor and is dropped, as D4RL's
    ``qlearning_dataset`` does; so is the file's last one if no flag ends its episode.

    :param path: the file; its name ("hopper_medium-v2.hdf5") tells the reference returns
    :param max_episode_steps: where episodes are cut if the file has no "timeouts", as early maze files; None for the time
        limit of the environment in the file's name
    :return: its episodes
    :raises DatasetError: if it can't be read
    """
    if max_episode_steps is not None and not (str(max_episode_steps).isdecimal() and int(max_episode_steps) > 0):
        raise DatasetError(f"max_episode_steps must be a number of at least 1, got {max_episode_steps!r}.")
    file = hdf5.open_file(path)
    if max_episode_steps is not None and "timeouts" in file:
        raise DatasetError(f"max_episode_steps: {path} has 'timeouts', which say where its episodes end: leave it out.")
    arrays = {key: hdf5.rows(file, key, path) for key in ("observations", "actions", "rewards", "terminals")}
    if "next_observations" in file:
        arrays["next_observations"] = hdf5.rows(file, "next_observations", path)
    small = {key: np.asarray(arrays.pop(key)) for key in ("rewards", "terminals")}
    small["terminations"] = as_flags(f"{path}: terminals", small.pop("terminals")).reshape(-1)
    if "timeouts" in file:
        small["truncations"] = as_flags(f"{path}: timeouts", np.asarray(hdf5.rows(file, "timeouts", path))).reshape(-1)
    else:
        limit = _limit(path, max_episode_steps)
        small["truncations"] = time_outs(small["terminations"], limit) & ~small["terminations"]
    source = read_mapping({**arrays, **small}, path)
    source.reference_returns = _lookup(REFERENCE_RETURNS, path)
    return source


def time_outs(terminations: np.ndarray, limit: int) -> np.ndarray:
    """
    :param terminations: boolean, (N,)
    :param limit: steps of an episode that doesn't terminate
    :return: steps at which the limit cuts an episode, (N,)
    """
    steps = np.arange(len(terminations))
    starts = np.zeros(len(terminations), np.int64)
    starts[1:][terminations[:-1]] = steps[1:][terminations[:-1]]
    since_start = steps - np.maximum.accumulate(starts)
    return since_start % limit == limit - 1


def _limit(path: str, given: str | None) -> int:
    limit = _lookup(TIME_LIMITS, path) if given is None else int(given)
    if limit is None:
        raise DatasetError(
            f"{path} has no 'timeouts', and its name tells no environment of D4RL: say where episodes are cut, as in "
            f"'d4rl:{path}?max_episode_steps=1000'."
        )
    return limit


def _lookup(table: dict[str, T], path: str) -> T | None:
    """The entry with the longest name that the file's name starts with, whichever way D4RL has spelt it."""
    name = os.path.basename(path).lower().replace("ant_maze_u-maze", "antmaze-umaze").replace("ant_maze", "antmaze")
    words = re.split(r"[-_.]", name.replace("walker_", "walker2d_").removeprefix("mini_"))
    names = ["-".join(words[:n]) for n in (3, 2, 1)]
    return next((table[name] for name in names if name in table), None)
