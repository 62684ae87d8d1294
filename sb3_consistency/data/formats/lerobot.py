"""LeRobot's folders, version 3 and 2.x: states, actions and videos."""

from __future__ import annotations

import glob
import json
import os
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError, as_flags
from sb3_consistency.data.flat import FlatSource
from sb3_consistency.data.formats.keywords import as_switch, as_words, joined_entries
from sb3_consistency.data.formats.video import VideoRows
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.stored import ChainedRows
from sb3_consistency.registry import how_to_install

OBSERVATION = "observation."


def open_lerobot(
    path: str, obs_keys: str | None = None, videos: str | None = None, size: str = "84", success_terminates: str = "0"
) -> FlatSource:
    """
    Read a folder of LeRobot. There is no observation after the last step: it is kept to clone behaviour (where there are no
    rewards), and dropped else.

    ``next.done`` marks the end of a recording, which is no termination; ``next.success`` may be one.

    :param path: the folder, with "meta" and "data"
    :param obs_keys: "observation.state,observation.environment_state": joined to one vector in this order; None for the one
        there is, or a Dict of all
    :param videos: "observation.images.top": videos that become observations, decoded as they are read; None for none
    :param size: height and width that their frames are scaled to, "96", or "96x128"
    :param success_terminates: "1": an episode whose last step has ``next.success`` ends in a termination
    :return: its episodes
    :raises DatasetError: if it can't be read
    :raises ImportError: if pyarrow (or av, for videos) is not installed
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"Datasets of LeRobot need pyarrow: {how_to_install('formats')}.") from error
    info = _json(path, "meta/info.json")
    features = info.get("features")
    if not isinstance(features, dict) or "action" not in features:
        raise DatasetError(f"dataset: {path}/meta/info.json names no feature 'action'.")
    stored = {key for key, value in features.items() if value.get("dtype") not in ("video", "image", "string")}
    keys = as_words(obs_keys) or sorted(key for key in stored if key.startswith(OBSERVATION))
    missing = [key for key in keys if key not in stored]
    if missing or not keys:
        raise DatasetError(f"dataset: {path} has no observations {missing} in its tables, it has {sorted(stored)}.")
    optional = sorted({"next.reward", "next.success"} & stored)
    files = sorted(glob.glob(os.path.join(glob.escape(path), "data", "chunk-*", "*.parquet")))
    if not files:
        raise DatasetError(f"dataset: there are no tables in {path}/data.")
    wanted = [*keys, "action", "episode_index", "frame_index", *optional]
    tables = [pq.read_table(file, columns=wanted) for file in files]
    columns = {key: np.concatenate([_array(table[key], features.get(key), key, path) for table in tables]) for key in wanted}
    _check_complete(columns, info, path)
    entries = {_short(key): columns[key] for key in keys}
    joined: Any = joined_entries(entries) if obs_keys or len(entries) == 1 else entries
    shown = as_words(videos)
    if shown:
        joined = joined if isinstance(joined, dict) else {"state": joined}
        joined.update({_short(key): _video(path, info, key, columns["episode_index"], _size(size)) for key in shown})
    arrays: dict[str, Any] = {
        "observations": joined,
        "actions": columns["action"],
        "episode": columns["episode_index"],
    }
    if "next.reward" in columns:
        arrays["rewards"] = columns["next.reward"]
        arrays["terminations"] = _successes(columns) & as_switch("success_terminates", success_terminates)
    source = read_mapping(arrays, path)
    source.action_space, source.inferred = _bounds(columns["action"]), ("observation_space", "action_space")
    left_out = sorted(key for key, value in features.items() if value.get("dtype") in ("video", "image") and key not in shown)
    if left_out:
        source.notes = (*source.notes, f"left out the images {left_out}")
    return source


def _short(key: str) -> str:
    """Names of modules, which SB3 makes of keys, can't hold dots."""
    return key.removeprefix(OBSERVATION).replace(".", "_")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and (width.isdigit() or not width) and int(height) > 0):
        raise DatasetError(f"size must be like 96 or 96x128, got {text!r}.")
    return int(height), int(width or height)


def _video(path: str, info: dict[str, Any], key: str, episode: np.ndarray, size: tuple[int, int]) -> ChainedRows:
    """The frames of all episodes: one file for several (version 3), or for every one."""
    if info["features"].get(key, {}).get("dtype") != "video":
        raise DatasetError(f"dataset: {path} has no video {key!r}.")
    numbers, lengths = np.unique(episode, return_counts=True)
    pattern, files = str(info.get("video_path", "")), _video_files(path, key)
    n_frames: dict[str, int] = {}
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        chunk, file = files.get(number, (number // int(info.get("chunks_size", 1000)), 0))
        fields = {"chunk_index": chunk, "episode_chunk": chunk, "file_index": file, "episode_index": number, "video_key": key}
        try:
            name = os.path.join(path, pattern.format(**fields))
        except (KeyError, ValueError, IndexError) as error:
            raise DatasetError(f"dataset: {path}/meta/info.json: can't understand video_path {pattern!r}.") from error
        n_frames[name] = n_frames.get(name, 0) + length
    return ChainedRows([VideoRows(name, n, size) for name, n in n_frames.items()], f"{path}: {key}")


def _video_files(path: str, key: str) -> dict[int, tuple[int, int]]:
    """Chunk and file of every episode's video, in version 3."""
    import pyarrow.parquet as pq

    names = [f"videos/{key}/chunk_index", f"videos/{key}/file_index"]
    found: dict[int, tuple[int, int]] = {}
    for file in sorted(glob.glob(os.path.join(glob.escape(path), "meta", "episodes", "chunk-*", "*.parquet"))):
        table = pq.read_table(file, columns=["episode_index", *names])
        rows = zip(*(table[name].to_pylist() for name in ("episode_index", *names)), strict=True)
        found.update({number: (chunk, index) for number, chunk, index in rows})
    return found


def _json(path: str, name: str) -> dict[str, Any]:
    try:
        with open(os.path.join(path, name), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"dataset: can't read {path}/{name}: {error}.") from error
    if not isinstance(content, dict):
        raise DatasetError(f"dataset: {path}/{name} must hold an object, got {type(content).__name__}.")
    return content


def _array(column: Any, feature: dict[str, Any] | None, key: str, path: str) -> np.ndarray:
    """A column as an array (rows, *shape); features of one number are stored as numbers."""
    flat = column.combine_chunks()
    if hasattr(flat, "chunks"):
        flat = flat.chunk(0) if flat.num_chunks else flat
    while hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
        flat = flat.flatten()
    values = flat.to_numpy(zero_copy_only=False)
    shape = tuple((feature or {}).get("shape") or ())
    rows = len(column)
    if key in ("episode_index", "frame_index") or shape in ((), (1,)):
        return values.reshape(rows, -1) if key.startswith((OBSERVATION, "action")) else values.reshape(rows)
    if values.size != rows * int(np.prod(shape)):
        raise DatasetError(f"{path}: {key} has {values.size} numbers in {rows} rows, its feature says {shape} a row.")
    return values.reshape(rows, *shape)


def _check_complete(columns: dict[str, np.ndarray], info: dict[str, Any], path: str) -> None:
    total, frames = info.get("total_frames"), columns["frame_index"]
    if total is not None and total != len(frames):
        raise DatasetError(f"{path}: its tables have {len(frames)} frames, meta/info.json says {total}: a file is missing.")
    new = np.concatenate([[True], columns["episode_index"][1:] != columns["episode_index"][:-1]])
    expected = np.arange(len(frames)) - np.maximum.accumulate(np.where(new, np.arange(len(frames)), 0))
    if (frames != expected).any():
        row = int(np.flatnonzero(frames != expected)[0])
        raise DatasetError(f"{path}: row {row} is frame {frames[row]} where {expected[row]} follows: frames are missing.")


def _successes(columns: dict[str, np.ndarray]) -> np.ndarray:
    episode = columns["episode_index"]
    last = np.concatenate([episode[1:] != episode[:-1], [True]])
    if "next.success" not in columns:
        return np.zeros(len(episode), bool)
    return as_flags("next.success", columns["next.success"]).reshape(-1) & last


def _bounds(actions: np.ndarray) -> spaces.Box:
    """Actions are in units of the robot: the bounds are those of the data."""
    low, high = actions.min(axis=0).astype(np.float32), actions.max(axis=0).astype(np.float32)
    still = low >= high
    return spaces.Box(np.where(still, low - 1, low), np.where(still, high + 1, high), dtype=np.float32)
