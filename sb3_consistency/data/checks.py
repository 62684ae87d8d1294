"""What the arrays of a dataset must be, whatever it is read from, and a number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

# one observation array (T, ...), or a (possibly nested) dict of them
Observations = Any


class DatasetError(RuntimeError):
    """A dataset that can't be found, read or used. The message names the cause and the remedy."""


def map_observations(function: Any, *observations: Observations) -> Observations:
    """
    Apply a function to every array of (nested) dict observations.

    :param function: called with one array of each of ``observations``
    :param observations: arrays or dicts of one structure
    :return: the results in the same structure
    """
    if isinstance(observations[0], Mapping):
        return {key: map_observations(function, *(o[key] for o in observations)) for key in observations[0]}
    return function(*observations)


def as_count(name: str, value: Any, at_least: int = 0) -> int:
    """
    :param name: name of the argument, for messages
    :param value: should be a number of steps; 1e6 is one, too
    :param at_least: the smallest that is allowed
    :return: the number
    :raises TypeError: if it is no whole number
    :raises ValueError: if it is too small
    """
    is_whole = isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer()
    if not is_whole:
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")
    return int(value)


def as_numbers(where: str, value: Any) -> np.ndarray:
    """
    :param where: what the value is, for messages
    :param value: should be an array of numbers with one row per step
    :return: the array
    :raises DatasetError: if it is anything else
    """
    try:
        array = value if getattr(value, "stays_in_file", False) else np.asarray(value)
    except ValueError as error:
        raise DatasetError(f"{where}: not an array, the rows differ in shape: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DatasetError(f"{where} must be real numbers, got type {array.dtype}.")
    if array.ndim == 0:
        raise DatasetError(f"{where} must have one row per step, got the single number {array}.")
    return array


def as_flags(where: str, value: Any) -> np.ndarray:
    """
    :param where: what the value is, for messages
    :param value: should be an array of booleans, or of zeros and ones
    :return: the boolean array
    :raises DatasetError: if it is anything else
    """
    array = np.asarray(as_numbers(where, value))
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        raise DatasetError(
            f"{where} must be True or False (1 or 0), got {array[wrong][0]} at step {np.argwhere(wrong)[0][0]}."
        )
    return array.astype(bool)


def check_lengths(name: str, index: int, episode: Mapping[str, Any]) -> int:
    """
    :param name: name of the dataset
    :param index: number of the episode
    :param episode: Minari episode: T + 1 observations, T of everything else
    :return: T
    :raises DatasetError: if the arrays don't fit together
    """
    n_steps = len(episode["rewards"])
    for key in ("actions", "terminations", "truncations"):
        if len(episode[key]) != n_steps:
            raise DatasetError(f"{name}, episode {index}: {len(episode[key])} {key} but {n_steps} rewards.")

    def check(array: np.ndarray) -> None:
        if len(array) != n_steps + 1:
            raise DatasetError(
                f"{name}, episode {index}: {len(array)} observations for {n_steps} steps, expected {n_steps + 1} "
                "(Minari stores the last one too)."
            )

    map_observations(check, episode["observations"])
    return n_steps
