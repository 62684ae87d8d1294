"""Zarr stores of Diffusion Policy (and of UMI and 3D Diffusion Policy, which share its layout)."""

from __future__ import annotations

from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError, as_numbers
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats.keywords import as_words, joined_entries
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.stored import StoredRows
from sb3_consistency.registry import how_to_install

#: what a store's observations are called if it has one vector of them
STATES = ("state", "obs", "observation", "observations")


def open_zarr(path: str, obs_keys: str | None = None, action_key: str = "action") -> FlatSource:
    """
    Read demonstrations. There are no rewards in such a store, and nothing ends in a termination.

    :param path: the store: "data/<key>", each (steps of all episodes, ...), and "meta/episode_ends"
    :param obs_keys: "a,b": arrays that are joined to one vector; None for the "state", or a Dict of all but the actions
    :param action_key: name of the actions
    :return: its episodes
    :raises DatasetError: if it can't be read
    :raises ImportError: if zarr is not installed
    """
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f"Zarr stores need zarr: {how_to_install('formats')}.") from error
    store: Any = zarr.open_group(path, mode="r")
    if "data" not in store or "meta/episode_ends" not in store:
        raise DatasetError(f"dataset: {path} is no store of Diffusion Policy: it has no 'data' and 'meta/episode_ends'.")
    data = {key: StoredRows(array, f"{path}: {key}") for key, array in store["data"].arrays()}
    names = as_words(obs_keys)
    missing = [key for key in (action_key, *names) if key not in data]
    if missing:
        raise DatasetError(f"dataset: {path} has no {missing}, it has {sorted(data)}: name them with obs_keys and action_key.")
    observations: Any
    state = [key for key in STATES if key in data]
    if names:
        observations = joined_entries({key: data[key] for key in names})
    elif state:
        observations = data[state[0]]
    else:
        observations = {key: array for key, array in data.items() if key != action_key}
    ends = as_numbers(f"{path}: episode_ends", np.asarray(store["meta/episode_ends"][:])).astype(np.int64)
    n_rows = len(data[action_key])
    if len(ends) == 0 or ends[-1] != n_rows or (np.diff(ends, prepend=0) <= 0).any():
        raise DatasetError(f"dataset: {path}: episode_ends must rise to the {n_rows} rows of {action_key!r}, got {ends}.")
    truncations = np.zeros(n_rows, bool)
    truncations[ends - 1] = True
    return read_mapping({"observations": observations, "actions": data[action_key], "truncations": truncations}, path)
