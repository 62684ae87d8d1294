"""Numbers and their description in one file that executes nothing: safetensors, with JSON in its header."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.stored import StoredRows, parts

#: the entry of a file's metadata that describes it
ENTRY = "sb3_consistency"
VERSION = 1
#: types of numbers that NumPy and safetensors share
DTYPES = {
    "float16": "F16", "float32": "F32", "float64": "F64", "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


#: pickles that this process wrote itself, as they were then
_written: set[tuple[str, int, int]] = set()


def wrote_pickle(path: str) -> None:
    """
    :param path: file that this process has just written, and need not be warned of
    """
    _written.update(_state(path))


def warn_of_pickle(path: str, writer: str) -> None:
    """
    Warn, once of every file, that what is about to be loaded runs code, unless this process wrote it.

    :param path: the file; SB3 adds ".pkl" where a name has no ending
    :param writer: the call that writes a safe one, with "{}" for its path
    """
    if _state(path) - _written:
        _warn_once(path, writer)


def _state(path: str) -> set[tuple[str, int, int]]:
    """Name, time and size of a file; empty if it is not there."""
    for name in (path, f"{path}.pkl"):
        if os.path.isfile(name):
            found = os.stat(name)
            return {(os.path.realpath(name), found.st_mtime_ns, found.st_size)}
    return set()


@cache
def _warn_once(path: str, writer: str) -> None:
    warnings.warn(
        f"{path} is a pickle: loading it runs the code in it, so it must come from someone you trust. "
        f"{writer.format(repr(f'{Path(path).stem}.safetensors'))} writes a file that executes nothing.",
        stacklevel=4,
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Write a file that takes another's place once it is complete; if anything fails that one stays.

    :param path: the file's place
    :return: where to write it
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], kind: str, stated: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """
    Write as safetensors lays files out, without a copy of the arrays: they may fill half the memory.

    :param path: file to write; ".safetensors" is added
    :param kind: what it is, for those who read it
    :param stated: description, plain JSON data
    :param tensors: the numbers
    :return: the file; an old one is replaced once the new one is complete
    :raises ValueError: if an array holds no numbers
    """
    target = Path(path) if str(path).endswith(".safetensors") else Path(f"{path}.safetensors")
    stated = {**stated, "kind": kind, "version": VERSION}
    offset, entries = 0, {}
    for key, array in tensors.items():
        if array.dtype.name not in DTYPES:
            raise ValueError(f"{key}: {array.dtype} is no type of numbers that a safe file can hold.")
        span = [offset, offset + array.nbytes]
        entries[key] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    described = json.dumps({**stated, "sha256": _digest(stated, tensors)}, allow_nan=False)
    header = json.dumps({"__metadata__": {ENTRY: described}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with replacing(target) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in tensors.values():
            for piece in _pieces(array):
                file.write(piece)
    return target


def _digest(stated: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """SHA-256 of the description and of all numbers with their names and shapes."""
    digest = hashlib.sha256(json.dumps(dict(stated), sort_keys=True).encode())
    for key, array in tensors.items():
        digest.update(f"{key} {array.dtype} {tuple(array.shape)}".encode())
        for piece in _pieces(array):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(array: Any) -> Iterator[bytes]:
    for rows in parts(len(array), int(np.prod(array.shape[1:])) * array.dtype.itemsize):
        yield np.asarray(array[rows]).tobytes()


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, StoredRows]]:
    """
    :param path: file of :func:`write_file`
    :param kind: what it should be
    :return: its description, and its arrays, which stay in it
    :raises DatasetError: if it is damaged, or of another kind
    """
    try:
        from safetensors import safe_open

        with safe_open(str(path), framework="numpy") as file:  # refuses what the header and the size don't agree on
            stated = json.loads(file.metadata()[ENTRY])
            names = list(file.keys())
        if not isinstance(stated, dict) or stated.get("kind") != kind or stated.get("version") != VERSION:
            raise ValueError(f"it holds {str(stated)[:60]}")
        header, start = _header(path)
        # in the order that they were written
        tensors = {name: _stored(path, header[name], start, name) for name in header if name in names}
        sha256 = stated.pop("sha256", None)
        if _digest(stated, tensors) != sha256:
            raise ValueError("it has changed since it was written")
    except Exception as error:  # safetensors' and json's errors have no common base
        if isinstance(error, FileNotFoundError):
            raise DatasetError(f"{path}: there is no such file.") from error
        raise DatasetError(f"{path}: damaged, or no {kind} that was saved without pickle: {error}.") from error
    return stated, tensors


def _header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _stored(path: str | os.PathLike[str], entry: dict[str, Any], start: int, name: str) -> StoredRows:
    dtype = {code: name for name, code in DTYPES.items()}[entry["dtype"]]
    shape = tuple(entry["shape"])
    if 0 in shape:
        return StoredRows(np.zeros(shape, dtype), f"{path}: {name}")
    return StoredRows(np.memmap(path, dtype, "r", start + entry["data_offsets"][0], shape), f"{path}: {name}")
