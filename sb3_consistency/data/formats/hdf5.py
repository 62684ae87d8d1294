"""HDF5 files: opened with an error that names the file, read when their rows are asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.stored import StoredRows
from sb3_consistency.registry import how_to_install

if TYPE_CHECKING:
    import h5py

#: bytes of every array that HDF5 keeps decompressed; its default of 1 MiB would make a sixth of a small buffer
CHUNK_CACHE = 2**18


def open_file(path: str) -> h5py.File:
    """
    :param path: an HDF5 file
    :return: the file, open for reading
    :raises DatasetError: if it is not there or damaged
    :raises ImportError: if h5py is not installed
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"HDF5 files need h5py: {how_to_install('offline')}.") from error
    if not os.path.isfile(path):
        raise DatasetError(f"dataset: there is no file {path}.")
    try:
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
    except OSError as error:
        raise DatasetError(f"dataset: can't read {path}, is it cut off?: {error}.") from error


def rows(file: h5py.Group, key: str, name: str) -> StoredRows:
    """
    :param file: file or group
    :param key: name of an array in it
    :param name: how messages call the dataset
    :return: the array, which stays in the file
    :raises DatasetError: if it is not there
    """
    import h5py

    found: Any = file.get(key)
    if not isinstance(found, h5py.Dataset):
        raise DatasetError(f"{name} has no array {key!r}, it has {sorted(file)}.")
    return StoredRows(found, f"{name}: {key}")
