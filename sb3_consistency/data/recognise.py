"""Which format a file or folder has, where looking at it is enough to tell."""

from __future__ import annotations

import os
from collections.abc import Callable

from sb3_consistency.data.checks import DatasetError

#: ending of a file -> its format
SUFFIXES = {".npz": "npz", ".pkl": "buffer", ".safetensors": "buffer", ".csv": "table", ".parquet": "table"}
HDF5_SUFFIXES = (".h5", ".hdf5")
#: the replay buffer in a run folder of rl-zoo3: as our algorithms save it, and as others do
BUFFERS = ("replay_buffer.safetensors", "replay_buffer.pkl")


def recognise(path: str) -> str:
    """
    :param path: a file, a folder, or anything else, which is taken for a Minari id
    :return: its format's prefix
    :raises DatasetError: if the file or folder can't be told
    """
    path = os.path.expanduser(path)
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return _folder(path)
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix in HDF5_SUFFIXES:
        return _hdf5(path)
    if os.path.isfile(path):
        raise DatasetError(f"dataset: can't tell the format of {path}: put its prefix in front, as in 'd4rl:{path}'.")
    return "minari"


def _folder(path: str) -> str:
    def has(*names: str) -> bool:
        return all(os.path.exists(os.path.join(path, name)) for name in names)

    tests: dict[str, Callable[[], bool]] = {
        "lerobot": lambda: has("meta/info.json"),
        "minari": lambda: has("metadata.json") or has("data/metadata.json"),
        "zarr": lambda: has("meta/episode_ends"),
        "imitation": lambda: has("dataset_info.json", "state.json"),
        "zoo": lambda: any(has(name) for name in BUFFERS),
    }
    for prefix, test in tests.items():
        if test():
            return prefix
    raise DatasetError(
        f"dataset: can't tell the format of the folder {path}: it is none of {sorted(tests)} (an rl-zoo3 run has a "
        "replay buffer if it was trained with --save-replay-buffer)."
    )


def _hdf5(path: str) -> str:
    from sb3_consistency.data.formats.hdf5 import open_file

    with open_file(path) as file:
        keys = set(file)
        if "data" in keys and any(name.startswith("demo") for name in file["data"]):
            return "robomimic"
        if "num_episodes" in keys or "episode_terminals" in keys:
            return "d3rlpy"
        if "episode_0" in keys:
            raise DatasetError(f"dataset: {path} is a file of a Minari dataset: give the folder that it lies in.")
        if {"observations", "actions", "terminals"} <= keys:
            return "d4rl"
    raise DatasetError(f"dataset: can't tell the format of {path}, which has {sorted(keys)}: put its prefix in front.")
