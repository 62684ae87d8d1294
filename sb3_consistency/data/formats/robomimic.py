"""HDF5 files of robomimic, and of what shares its layout (MimicGen, robosuite, LIBERO)."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats import hdf5
from sb3_consistency.data.formats.keywords import as_switch, as_words, joined_entries
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.stored import ChainedRows


def open_robomimic(
    path: str, obs_keys: str | None = None, filter: str | None = None, success_terminates: str = "0"
) -> FlatSource:
    """
    Read demonstrations of robomimic.

    ``dones`` are not read: whether they mark a success or the last step depends on how the file was made. A demonstration
    ends truncated; its last step is dropped if the file has no ``next_obs``.

    :param path: the file
    :param obs_keys: "a,b": observations that are joined to one vector in this order; None for a Dict of all
    :param filter: name of a list of demonstrations in the file's "mask", like "train"
    :param success_terminates: "1": a last step with a positive reward is a termination
    :return: the demonstrations, in the order of their numbers
    :raises DatasetError: if it can't be read
    """
    file = hdf5.open_file(path)
    names = _demonstrations(file, path, filter)
    demos = [file[f"data/{name}"] for name in names]
    if any("obs" not in demo for demo in demos):
        raise DatasetError(f"{path} has states but no observations: make them with robomimic's dataset_states_to_obs.py.")
    keys = as_words(obs_keys) or sorted(demos[0]["obs"])
    lengths = [len(hdf5.rows(demo, "actions", f"{path}: {name}")) for demo, name in zip(demos, names, strict=True)]
    arrays: dict[str, Any] = {
        "observations": _chain(demos, names, "obs", keys, path, join=obs_keys is not None),
        "actions": ChainedRows([demo["actions"] for demo in demos], f"{path}: actions"),
        "episode": np.repeat(np.arange(len(demos)), lengths),
        "action_space": spaces.Box(-1, 1, demos[0]["actions"].shape[1:], np.float32),
    }
    if all("next_obs" in demo for demo in demos):
        arrays["next_observations"] = _chain(demos, names, "next_obs", keys, path, join=obs_keys is not None)
    if all("rewards" in demo for demo in demos):
        rewards = np.asarray(ChainedRows([demo["rewards"] for demo in demos], f"{path}: rewards"))
        last = np.zeros(len(rewards), bool)
        last[np.cumsum(lengths) - 1] = True
        positive = rewards.reshape(len(rewards), -1)[:, 0] > 0
        arrays["rewards"] = rewards
        arrays["terminations"] = last & positive & as_switch("success_terminates", success_terminates)
    return read_mapping(arrays, path)


def _demonstrations(file: Any, path: str, filter: str | None) -> list[str]:
    if "data" not in file:
        raise DatasetError(f"{path} is no file of robomimic: it has no group 'data' but {sorted(file)}.")
    if filter is None:
        names = [name for name in file["data"] if "actions" in file["data"][name]]
    elif "mask" in file and filter in file["mask"]:
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in file["mask"][filter]]
    else:
        raise DatasetError(f"{path} has no filter {filter!r}, it has {sorted(file.get('mask', {}))}.")
    missing = [name for name in names if name not in file["data"]]
    if missing or not names:
        raise DatasetError(f"{path}: no demonstrations {missing}, it has {sorted(file['data'])[:10]}.")
    digits = {name: "".join(c for c in name if c.isdigit()) for name in names}
    return sorted(names, key=lambda name: (int(digits[name] or -1), name))  # demo_10 after demo_9


def _chain(demos: list[Any], names: list[str], group: str, keys: list[str], path: str, join: bool) -> Any:
    for demo, name in zip(demos, names, strict=True):
        missing = [key for key in keys if key not in demo[group]]
        if missing:
            raise DatasetError(f"{path}, {name}: no {group} {missing}, it has {sorted(demo[group])}.")
    entries = {key: ChainedRows([demo[group][key] for demo in demos], f"{path}: {group}/{key}") for key in keys}
    return joined_entries(entries) if join else entries
