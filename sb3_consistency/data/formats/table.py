"""Tables with one row per step: CSV, parquet, pandas."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats.keywords import as_words
from sb3_consistency.data.mapping import DONE_KEYS, SYNONYMS, read_mapping
from sb3_consistency.registry import how_to_install

#: what columns of one group start with: obs_0, obs_1 or observation.x, observation.y
PREFIXES = {
    "observations": ("observation", "observations", "obs", "state"),
    "next_observations": (
        *("next_observation", "next_observations", "next_obs", "next_state"),
        *("observation_next", "observations_next", "obs_next", "state_next", "new_obs"),
    ),
    "actions": ("action", "actions", "act"),
}
SINGLE = ("rewards", "terminations", "truncations", "episode")
#: what a mapping may call them, too
FLAGS = ("terminals", *DONE_KEYS)


def open_table(path: str, **columns: str) -> FlatSource:
    """
    Read a table with one row per step, ordered by episode and time.

    :param path: a ``.csv`` or ``.parquet`` file
    :param columns: as for :func:`read_frame`
    :return: its episodes
    :raises DatasetError: if it can't be read
    :raises ImportError: if pandas (or pyarrow, for parquet) is not installed
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"Tables need pandas: {how_to_install('formats')}.") from error
    if not os.path.isfile(path):
        raise DatasetError(f"dataset: there is no file {path}.")
    frame = pd.read_parquet(path) if path.lower().endswith(".parquet") else pd.read_csv(path)
    return read_frame(frame, path, **columns)


def read_frame(frame: Any, name: str = "the table", **columns: str) -> FlatSource:
    """
    Read a pandas DataFrame.

    :param frame: one row per step; columns "obs_..." (or "observation...", "state..."), "action...", perhaps "reward",
        "terminated", "truncated", "episode" and "next_obs_..."
    :param name: how messages call the dataset
    :param columns: other names: ``observations="x,y"``, ``actions="u"``, ``rewards="r"``, ``episode="run"``, ...
    :return: its episodes
    :raises DatasetError: if columns are missing
    """
    unknown = set(columns) - {*PREFIXES, *SINGLE}
    if unknown:
        raise DatasetError(f"{name}: no option {sorted(unknown)}; columns are named by {sorted({*PREFIXES, *SINGLE})}.")
    known = list(map(str, frame.columns))
    arrays: dict[str, Any] = {}
    told = {word for words in columns.values() for word in as_words(words)}
    others = [column for column in known if column not in told]
    for key in (*PREFIXES, *SINGLE):
        chosen = as_words(columns.get(key)) or (_group(others, key) if key in PREFIXES else _single(others, key))
        missing = [column for column in chosen if column not in known]
        if missing:
            raise DatasetError(f"{name}: no column {missing}, it has {known}.")
        if chosen:
            arrays[key] = _values(frame, chosen, name) if key in PREFIXES else _values(frame, chosen, name)[:, 0]
    if "rewards" in arrays or "episode" not in arrays:
        arrays |= {key: _values(frame, [c], name)[:, 0] for key in FLAGS for c in others if c.lower() == key}
    for key in ("observations", "actions"):
        if key not in arrays:
            raise DatasetError(
                f"{name}: no columns of {key}: call them '{PREFIXES[key][0]}_...', or name them, as in "
                f"'table:{name}?{key}=a,b'. It has {known}."
            )
    for key in ("observations", "next_observations"):
        if key in arrays:
            arrays[key] = arrays[key].astype(np.float32)
    return read_mapping(arrays, name)


def _group(known: list[str], key: str) -> list[str]:
    found = [c for c in known if any(c.lower() == p or c.lower().startswith((f"{p}_", f"{p}.")) for p in PREFIXES[key])]
    # obs_next_0 begins with obs_, too
    return [c for c in found if c not in _group(known, "next_observations")] if key == "observations" else found


def _single(known: list[str], key: str) -> list[str]:
    names = (key, *SYNONYMS[key])
    return [c for c in known if c.lower() in names][:1]


def _values(frame: Any, chosen: list[str], name: str) -> np.ndarray:
    part = frame[chosen]
    if len(chosen) == 1 and part[chosen[0]].dtype == object and len(part) and hasattr(part[chosen[0]].iloc[0], "__len__"):
        try:
            values = np.stack([np.asarray(x) for x in part[chosen[0]]])  # a parquet column of lists
        except ValueError as error:
            raise DatasetError(f"{name}: the rows of {chosen[0]!r} differ in length: {error}.") from error
    else:
        values = part.to_numpy()
    if values.dtype.kind not in "biuf":  # words are objects or str, by the version of pandas
        raise DatasetError(f"{name}: the columns {chosen} must hold numbers, got {part.dtypes.to_dict()}.")
    return values
