"""Trajectories of the imitation library: folders of Hugging Face's datasets, and its older ``.npz`` files."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError, as_flags, as_numbers
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.registry import how_to_install


def open_imitation(path: str) -> FlatSource:
    """
    Read trajectories that ``imitation.data.serialize.save`` wrote. ``infos`` hold pickled objects, and are never decoded.

    :param path: the folder, or an older ``.npz`` file
    :return: the trajectories
    :raises DatasetError: if it can't be read
    :raises ImportError: if pyarrow is not installed
    """
    if path.endswith(".npz"):
        from sb3_consistency.data.stored import open_npz

        return from_flat_arrays(open_npz(path, leave_out=("infos",)), path)
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f"Trajectories of imitation need pyarrow: {how_to_install('formats')}.") from error
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.arrow")))
    if not files:
        raise DatasetError(f"dataset: there are no .arrow files in {path}.")
    columns: dict[str, list[Any]] = {}
    for file in files:
        with pa.memory_map(file) as source:
            table = pa.ipc.open_stream(source).read_all()
        missing = {"obs", "acts", "terminal"} - set(table.column_names)
        if missing:
            raise DatasetError(f"dataset: {file} holds no trajectories of imitation: it has no {sorted(missing)}.")
        for key in {"obs", "acts", "terminal", "rews"} & set(table.column_names):
            values = table[key].to_pylist() if key == "terminal" else [_trajectory(row.values) for row in table[key]]
            columns.setdefault(key, []).extend(values)
    terminal = np.asarray(columns.pop("terminal"), bool)
    return _source(columns, terminal, path)


def _trajectory(values: Any) -> np.ndarray:
    """What a row holds, lists in lists, as an array of the type that its numbers are stored in."""
    shape = [len(values)]
    while hasattr(values.type, "value_type"):
        n_lists, values = len(values), values.flatten()
        shape.append(len(values) // max(1, n_lists))
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)


def is_flat_imitation(arrays: Mapping[str, Any]) -> bool:
    """
    :param arrays: arrays by name
    :return: whether they are trajectories of imitation, joined
    """
    return {"obs", "acts", "terminal", "indices"} <= set(arrays)


def from_flat_arrays(arrays: Mapping[str, Any], path: str) -> FlatSource:
    """
    :param arrays: "obs", "acts", "terminal" and "indices" (where trajectories are split), perhaps "rews"
    :param path: how messages call the dataset
    :return: the trajectories
    :raises DatasetError: if they don't fit together
    """
    if not is_flat_imitation(arrays):
        raise DatasetError(f"dataset: {path} holds no trajectories of imitation, but {sorted(arrays)}.")
    indices = np.asarray(as_numbers(f"{path}: indices", arrays["indices"])).astype(np.int64)
    steps = {key: np.split(np.asarray(arrays[key]), indices) for key in ("acts", "rews") if key in arrays}
    observations = np.split(np.asarray(arrays["obs"]), indices + np.arange(len(indices)) + 1)
    return _source({"obs": observations, **steps}, as_flags(f"{path}: terminal", arrays["terminal"]).reshape(-1), path)


def _source(trajectories: dict[str, list[np.ndarray]], terminal: np.ndarray, path: str) -> FlatSource:
    lengths = np.array([len(actions) for actions in trajectories["acts"]])
    for i, (observations, length) in enumerate(zip(trajectories["obs"], lengths, strict=True)):
        if len(observations) != length + 1:
            raise DatasetError(f"{path}, trajectory {i}: {len(observations)} observations, {length} actions; one more needed.")
    if len(terminal) != len(lengths):
        raise DatasetError(f"{path}: {len(terminal)} 'terminal' for {len(lengths)} trajectories.")
    if lengths.sum() == 0:
        raise DatasetError(f"{path}: no transitions.")
    terminations = np.zeros(lengths.sum(), bool)
    terminations[(np.cumsum(lengths) - 1)[terminal & (lengths > 0)]] = True
    kept = np.flatnonzero(lengths > 0)
    arrays: dict[str, Any] = {
        "observations": np.concatenate([trajectories["obs"][i] for i in kept]),
        "actions": np.concatenate([trajectories["acts"][i] for i in kept]),
        "terminations": terminations,
        "episode": np.repeat(np.arange(len(lengths)), lengths),
    }
    if "rews" in trajectories:
        arrays["rewards"] = np.concatenate([trajectories["rews"][i] for i in kept])
    return read_mapping(arrays, path)
