"""d3rlpy's replay buffers in HDF5, of its second and its first major version."""

from __future__ import annotations

from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError, as_flags
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats import hdf5
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.stored import ChainedRows


def open_d3rlpy(path: str) -> FlatSource:
    """
    Read a file of d3rlpy: ``ReplayBuffer.dump`` (2.x), or ``MDPDataset.dump`` (1.x).

    An episode of T steps has T observations: its last step is kept if it terminates, else it has no successor.

    :param path: the file
    :return: its episodes
    :raises DatasetError: if it can't be read, or has discrete actions
    """
    file = hdf5.open_file(path)
    arrays = _first_version(file, path) if "episode_terminals" in file else _second_version(file, path)
    if np.issubdtype(arrays["actions"].dtype, np.integer):
        raise DatasetError(f"{path} has discrete actions: only continuous (Box) actions can be learned.")
    return read_mapping(arrays, path)


def _first_version(file: Any, path: str) -> dict[str, Any]:
    arrays: dict[str, Any] = {key: hdf5.rows(file, key, path) for key in ("observations", "actions")}
    names = ("terminals", "episode_terminals")
    flags = {key: as_flags(f"{path}: {key}", np.asarray(hdf5.rows(file, key, path))) for key in names}
    arrays["rewards"] = np.asarray(hdf5.rows(file, "rewards", path))
    arrays["terminations"] = flags["terminals"].reshape(-1)
    arrays["truncations"] = flags["episode_terminals"].reshape(-1) & ~arrays["terminations"]
    return arrays


def _second_version(file: Any, path: str) -> dict[str, Any]:
    number = file.get("num_episodes") if "num_episodes" in file else file.get("total_size")
    if number is None:
        raise DatasetError(f"{path} is no file of d3rlpy: it has no 'num_episodes' but {sorted(file)[:10]}.")
    indices = range(int(np.asarray(number[()]).reshape(-1)[0]))
    if not indices:
        raise DatasetError(f"{path} is empty: it has no episodes.")

    def chain(key: str) -> ChainedRows:
        return ChainedRows([hdf5.rows(file, key.format(i), path) for i in indices], f"{path}: {key.format('*')}")

    parts = [key for key in file if key.startswith("observations_0_")]
    observations: Any = (
        chain("observations_{}")
        if not parts
        else {f"observation_{j}": chain("observations_{}_" + str(j)) for j in range(len(parts))}
    )
    actions = chain("actions_{}")
    lengths = [len(hdf5.rows(file, f"actions_{i}", path)) for i in indices]
    ends = np.cumsum(lengths) - 1
    terminations = np.zeros(len(actions), bool)
    terminations[ends] = [as_flags(f"{path}: terminated_{i}", [file[f"terminated_{i}"][()]]).reshape(-1)[-1] for i in indices]
    return {
        "observations": observations,
        "actions": actions,
        "rewards": np.asarray(chain("rewards_{}")),
        "terminations": terminations,
        "episode": np.repeat(np.arange(len(lengths)), lengths),
    }
