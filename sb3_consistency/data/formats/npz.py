"""Files of NumPy arrays: our own keys, OGBench's, or imitation's trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats.imitation import from_flat_arrays, is_flat_imitation
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.stored import open_npz


def open_npz_file(path: str) -> FlatSource:
    """
    :param path: an ``.npz`` file of arrays by name
    :return: its episodes
    :raises DatasetError: if it can't be read
    """
    arrays = open_npz(path)
    return from_flat_arrays(arrays, path) if is_flat_imitation(arrays) else read_mapping(nested(arrays), path)


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """
    :param arrays: arrays by name; the entries of Dict observations as "observations/<key>"
    :return: the entries of one Dict joined
    :raises DatasetError: if a name is both an array and a Dict
    """
    joined: dict[str, Any] = {}
    for key, array in arrays.items():
        if isinstance(array, np.ndarray) and array.dtype.hasobject:
            raise DatasetError(f"{key}: pickled objects are not read.")
        *path, last = key.split("/")
        place: Any = joined
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise DatasetError(f"{key}: {part!r} is an array, too.")
        place[last] = array
    return joined
