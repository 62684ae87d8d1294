"""Options of datasets, which come as texts: "<prefix>:<path>?<option>=<text>"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError


def as_words(value: Any) -> list[str]:
    """
    :param value: "a,b" or "a+b" (where commas part datasets), a list of texts, or None
    :return: the list
    """
    words = value.replace("+", ",").split(",") if isinstance(value, str) else list(value or [])
    return [str(word).strip() for word in words if str(word).strip()]


def as_switch(name: str, value: Any) -> bool:
    """
    :param name: name of the option
    :param value: should be "0" or "1", or a boolean
    :return: whether it is on
    :raises DatasetError: if it is anything else
    """
    if str(value).lower() not in ("0", "1", "false", "true"):
        raise DatasetError(f"{name} must be 0 or 1, got {value!r}.")
    return str(value).lower() in ("1", "true")


def joined_entries(entries: Mapping[str, Any]) -> np.ndarray:
    """
    :param entries: arrays (N, ...) of numbers
    :return: one vector per row, the entries in their order, (N, D) in float32
    """
    arrays = [np.asarray(entry).astype(np.float32) for entry in entries.values()]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)
