"""Videos as arrays of frames, decoded as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.stored import ForwardRows
from sb3_consistency.registry import how_to_install


class VideoRows(ForwardRows):
    """
    The frames of a video, (frames, height, width, 3) in RGB.

    :param path: the file
    :param n_frames: how many frames it should have
    :param size: (height, width) that frames are scaled to
    :raises DatasetError: if it is not there
    :raises ImportError: if av is not installed
    """

    def __init__(self, path: str, n_frames: int, size: tuple[int, int]) -> None:
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ImportError(f"Videos need av: {how_to_install('video')}.") from error
        if not os.path.isfile(path):
            raise DatasetError(f"dataset: there is no file {path}.")
        self.shape, self.dtype = (n_frames, *size, 3), np.dtype(np.uint8)
        self._path = path
        self._frames: Iterator[Any] = iter(())
        super().__init__(self, path)
        self._begin()

    def restart(self) -> None:
        self._frames = self._decode()

    def _decode(self) -> Iterator[Any]:
        import av

        _, height, width, _ = self.shape
        with av.open(self._path) as container:
            for frame in container.decode(video=0):
                yield frame.reformat(width=width, height=height, format="rgb24").to_ndarray()

    def advance(self, n_rows: int) -> np.ndarray:
        frames = [frame for _, frame in zip(range(n_rows), self._frames, strict=False)]
        if len(frames) < n_rows:
            raise DatasetError(f"{self._path} has fewer frames than the {self.shape[0]} of its episodes.")
        return np.stack(frames)
