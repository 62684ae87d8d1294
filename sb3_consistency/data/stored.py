"""Arrays that stay in their file: rows are read when they are asked for, a few megabytes at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError

#: smaller arrays are read at once
SMALL_BYTES = 2**20


class StoredRows:
    """
    An array in a file, of which slices of rows can be read.

    :param stored: what reads them: it has ``shape`` and ``dtype`` and takes slices, as arrays of h5py and zarr do
    :param where: what it is, for messages
    """

    stays_in_file = True

    def __init__(self, stored: Any, where: str) -> None:
        self._stored, self._where = stored, where
        self.shape: tuple[int, ...] = tuple(stored.shape)
        self.dtype: np.dtype = np.dtype(stored.dtype)

    @property
    def mapped(self) -> np.ndarray:
        """The array as it is stored, of a file that is mapped into memory."""
        return self._stored

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole array."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        try:
            return self._read(rows)
        except Exception as error:  # whatever the file's library raises where it is damaged
            raise DatasetError(f"{self._where} is damaged: {error!r}.") from error

    def _read(self, rows: slice) -> np.ndarray:
        return np.asarray(self._stored[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class ChainedRows(StoredRows):
    """
    Several arrays in a file, one after the other, as one: the demonstrations of an HDF5 file, for example.

    :param chain: arrays of one shape per row, at least one
    :param where: what they are, for messages
    :raises DatasetError: if their rows differ in shape
    """

    def __init__(self, chain: Sequence[Any], where: str) -> None:
        shapes = {tuple(each.shape[1:]) for each in chain}
        if len(shapes) != 1:
            raise DatasetError(f"{where}: the rows of the episodes differ in shape: {sorted(shapes)}.")
        self._chain, self._where, self._front = chain, where, 0
        self._starts = np.concatenate([[0], np.cumsum([each.shape[0] for each in chain])])
        self.shape = (int(self._starts[-1]), *shapes.pop())
        self.dtype = np.result_type(*{np.dtype(each.dtype) for each in chain})

    def _read(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for passed in self._chain[self._front : first]:
            if isinstance(passed, ForwardRows):
                passed.release()
        self._front = first
        pieces = [np.empty((0, *self.shape[1:]), self.dtype)]
        while start < stop:
            low, high = self._starts[first], min(stop, int(self._starts[first + 1]))
            pieces.append(np.asarray(self._chain[first][start - low : high - low]))
            start, first = high, first + 1
        return np.concatenate(pieces).astype(self.dtype, copy=False)


class ForwardRows(StoredRows):
    """An array that is decoded as it is read. Forward is cheap; back (but for the last slice) is from the start again."""

    _at = 0
    _last: np.ndarray

    def restart(self) -> None:
        """Go to the first row."""
        raise NotImplementedError

    def advance(self, n_rows: int) -> np.ndarray:
        """
        :param n_rows: how many rows to decode, of those that are left
        :return: the next rows, (n_rows, ...)
        """
        raise NotImplementedError

    def release(self) -> None:
        """Let go of what was decoded, and of the decoder: one per episode is too many."""
        if self._at:
            self._begin()

    def _begin(self) -> None:
        self.restart()
        self._at, self._last = 0, np.empty((0, *self.shape[1:]), self.dtype)

    def _read(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        assert step == 1
        stop = max(start, stop)
        if start < self._at - len(self._last):
            self._begin()
        # the next observations of a block end one row into the block after
        again = self._last[start - (self._at - len(self._last)) :] if start < self._at else self._last[:0]
        if stop <= self._at:
            return again[: stop - start]
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        while self._at < start:
            self._at += len(self.advance(min(start - self._at, max(1, SMALL_BYTES // max(1, row_bytes)))))
        read = self.advance(stop - self._at)
        self._at = stop
        self._last = np.concatenate([again, read]) if len(again) else read
        return self._last


class NpzRows(ForwardRows):
    """
    An array in an ``.npz`` file, decompressed as it is read.

    :param path: the file
    :param member: name of the array, with ``.npy``
    """

    def __init__(self, path: str, member: str) -> None:
        self._path, self._member = path, member
        self._file: Any = None
        self.restart()
        super().__init__(self, f"{path}: {member}")
        self._begin()

    def restart(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = zipfile.ZipFile(self._path).open(self._member)
        version = np.lib.format.read_magic(self._file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, self._fortran_order, dtype = read(self._file)
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    @property
    def is_readable(self) -> bool:
        """Whether rows lie one after the other in the file, as numbers."""
        return not self._fortran_order and not self.dtype.hasobject and self.ndim > 0

    def advance(self, n_rows: int) -> np.ndarray:
        data = self._file.read(n_rows * int(np.prod(self.shape[1:])) * self.dtype.itemsize)
        return np.frombuffer(data, dtype=self.dtype).reshape(n_rows, *self.shape[1:])


def open_npz(path: str, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """
    :param path: an ``.npz`` file
    :param leave_out: names of arrays that are not read
    :return: its arrays by name; those that are large stay in the file
    :raises DatasetError: if the file is damaged or holds pickled objects
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()  # what is read in pieces is not checked to its end
            if broken is not None:
                raise zipfile.BadZipFile(f"Bad CRC-32 for file {broken!r}")
            sizes = {info.filename: info.file_size for info in file.infolist()}
        with np.load(path, allow_pickle=False) as arrays:
            return {key: _open_member(path, arrays, key, sizes) for key in arrays.files if key not in leave_out}
    except Exception as error:  # zipfile's, zlib's and numpy's errors have no common base
        raise DatasetError(f"dataset: can't read {path}: {error!r}.") from error


def _open_member(path: str, arrays: Any, key: str, sizes: Mapping[str, int]) -> Any:
    member = f"{key}.npy"
    if sizes.get(member, 0) > SMALL_BYTES:
        rows = NpzRows(path, member)
        if rows.is_readable:
            return rows
    return arrays[key]


def take(array: Any, rows: np.ndarray) -> np.ndarray:
    """
    :param array: an array in memory or in a file
    :param rows: numbers of its rows
    :return: these rows
    """
    if isinstance(array, np.ndarray) or len(rows) == 0:
        return array[rows] if len(rows) else np.asarray(array[0:0])
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= 4 * len(rows):
        return array[low:high][rows - low]
    # far apart: one read, forward, for every run of rows
    unique, back = np.unique(rows, return_inverse=True)
    runs = np.split(unique, np.flatnonzero(np.diff(unique) > 64) + 1)
    return np.concatenate([array[run[0] : run[-1] + 1][run - run[0]] for run in runs])[back]


def parts(n_rows: int, row_bytes: int) -> list[slice]:
    """
    :param n_rows: number of rows of an array
    :param row_bytes: size of one
    :return: slices of a few megabytes that cover it
    """
    step = max(1, SMALL_BYTES // max(1, row_bytes))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
