"""OGBench's files, and its single tasks, whose rewards its own package computes."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.stored import open_npz

FOLDER = "~/.ogbench/data"
TASKS = ("1", "2", "3", "4", "5", "default")


def open_ogbench(path: str, task: str | None = None, folder: str = FOLDER) -> FlatSource:
    """
    Read a file of OGBench. In it ``terminals`` mark the last row of a recording, which holds its last observation alone:
    the end is no termination.

    A single task has rewards and terminations (``masks`` == 0): they are computed by OGBench's own ``relabel_dataset``,
    which looks at the state *before* the step, one step earlier than the environment does online.

    :param path: an ``.npz`` file, or OGBench's name of a data set ("cube-single-play-v0",
        "cube-single-play-singletask-task1-v0"), which is looked for in ``folder``
    :param task: number of the single task, "1" to "5", or "default"; None for the one in the name, if any
    :param folder: where data sets lie by their names
    :return: its episodes
    :raises DatasetError: if it is not there or can't be read
    :raises ImportError: if a single task is asked for and OGBench is not installed
    """
    if task is not None and task not in TASKS:
        raise DatasetError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    name = os.path.basename(path).removesuffix(".npz")
    match = _match(name)
    part = match["task"] if match else None
    if task is not None:
        part = "singletask" if task == "default" else f"singletask-task{task}"
    if not path.endswith(".npz"):
        if match is None:
            raise DatasetError(f"dataset: {path!r} is neither an .npz file nor a name of OGBench like 'cube-single-play-v0'.")
        file = f"{match['env']}-{match['data']}-{match['version']}{match['val']}.npz"
        path = os.path.join(os.path.expanduser(folder), file)
    if not os.path.isfile(path):
        raise DatasetError(f"dataset: there is no file {path}: fetch it with ogbench.download_datasets.")
    arrays = open_npz(path)
    missing = {"observations", "actions", "terminals"} - set(arrays)
    if missing:
        raise DatasetError(f"dataset: {path} is no file of OGBench: it has no {sorted(missing)}.")
    if part is None:
        source = read_mapping(arrays, path, ogbench=True)
        env_id = None if match is None else f"{match['env']}-{match['version']}"
    else:
        if match is None:
            raise DatasetError(f"dataset: {path}: the file's name must be OGBench's, it tells the environment.")
        env_id = f"{match['env']}-{part}-{match['version']}"
        source = read_mapping({**arrays, **_relabelled(env_id, arrays)}, f"{path} ({part})", ogbench=True)
    _name_environment(source, env_id)
    return source


def _match(name: str) -> dict[str, str | None] | None:
    """Parts of a name as OGBench gives them: ENV-DATA-vN or ENV-DATA-singletask-taskK-vN, None for another."""
    found = re.fullmatch(r"(.+?)(?:-(singletask(?:-task\d)?))?-(v\d+)(-val)?", name)
    env, dash, data = found[1].rpartition("-") if found else ("", "", "")
    if found is None or not dash:
        return None
    return {"env": env, "data": data, "task": found[2], "version": found[3], "val": found[4] or ""}


def _relabelled(env_id: str, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    try:
        import gymnasium as gym
        import ogbench  # noqa: F401
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        raise ImportError(f"The rewards of {env_id} are computed by OGBench: pip install ogbench.") from error
    env = gym.make(env_id)
    try:
        env.reset()
        names = ("qpos", "qvel", "button_states", "terminals")
        dataset = {key: np.asarray(arrays[key]) for key in names if key in arrays}
        relabel_dataset(env_id, env, dataset)
    finally:
        env.close()
    return {key: np.asarray(dataset[key]) for key in ("rewards", "masks")}


def _name_environment(source: FlatSource, env_id: str | None) -> None:
    try:
        import gymnasium as gym
        import ogbench  # noqa: F401

        source.env_spec = None if env_id is None else gym.spec(env_id)
    except (ImportError, gym.error.Error):
        source.env_spec = None  # then env=... must be given, as the error of make_env says
