"""Bounds of action spaces, in the arithmetic that does not leave them."""

from typing import NamedTuple

import numpy as np
from gymnasium import spaces


class Bounds(NamedTuple):
    """Of a Box, in float64 and its shape: actions are middle + half_range x with x in [-1, 1]."""

    low: np.ndarray
    high: np.ndarray
    middle: np.ndarray
    half_range: np.ndarray


def action_bounds(space: spaces.Space) -> Bounds:
    """
    :param space: action space, a bounded Box
    :return: its bounds; float32 arithmetic would leave them by rounding, and the whole range may overflow
    """
    assert isinstance(space, spaces.Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return Bounds(low, high, low / 2 + high / 2, high / 2 - low / 2)
