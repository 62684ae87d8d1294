"""
Replay buffers and VecNormalize statistics as files that execute nothing: numbers in safetensors, their description in JSON.

SB3's ``.pkl`` files are pickles, which run code of their author's when they are loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.frames import FINALS, FrameReplayBuffer
from sb3_consistency.data.safe_file import read_file, write_file
from sb3_consistency.data.stored import StoredRows, parts

BUFFER, STATISTICS = "replay buffer", "VecNormalize"
CLASSES = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer, FrameReplayBuffer)
ROWS = ("actions", "rewards", "dones", "timeouts")
#: what VecNormalize is made with
PARTS = ("mean", "var")
SETTINGS: dict[str, type] = {
    "training": bool,
    "norm_obs": bool,
    "norm_reward": bool,
    "clip_obs": float,
    "clip_reward": float,
    "gamma": float,
    "epsilon": float,
}


def save_buffer(buffer: ReplayBuffer, path: str | os.PathLike[str], **description: Any) -> Path:
    """
    Write a replay buffer; only rows that are filled.

    :param buffer: SB3's ``ReplayBuffer``, ``DictReplayBuffer``, ``NStepReplayBuffer`` or ``HerReplayBuffer`` (whose infos
        must be empty), or a ``FrameReplayBuffer``
    :param path: file to write; ".safetensors" is added
    :param description: more to write, as plain JSON data
    :return: the file
    :raises ValueError: if the buffer holds what is not numbers, or is of another class
    """
    if type(buffer) not in CLASSES:
        raise ValueError(
            f"replay_buffer: a safe file holds SB3's buffers and FrameReplayBuffer, and this {type(buffer).__name__} may have "
            "more to save than these."
        )
    if isinstance(buffer, HerReplayBuffer) and buffer.copy_info_dict:
        raise ValueError("replay_buffer: infos are objects, which a safe file can't hold; use copy_info_dict=False.")
    n_rows, arrays = buffer.size(), {key: getattr(buffer, key) for key in ROWS}
    if isinstance(buffer, FrameReplayBuffer):
        arrays.update(_named("frames", buffer.frames), final_slot=buffer.final_slot, age=buffer.age, repeated=buffer.repeated)
    else:
        arrays.update(_named("observations", buffer.observations))
        if not buffer.optimize_memory_usage:
            arrays.update(_named("next_observations", buffer.next_observations))
        else:
            n_rows = buffer.buffer_size  # the row after the newest holds its next observation
    if isinstance(buffer, HerReplayBuffer):
        arrays.update(ep_start=buffer.ep_start, ep_length=buffer.ep_length)
    tensors = {key: array[:n_rows] for key, array in arrays.items()}
    if isinstance(buffer, FrameReplayBuffer):
        tensors.update(_named("newest", buffer.newest))
        for key, chunks in buffer.finals.items():
            tensors.update({f"finals/{key}/{i:06d}": chunk for i, chunk in enumerate(chunks)})
    if isinstance(buffer, HerReplayBuffer):
        tensors["current_ep_start"] = buffer._current_ep_start
    if isinstance(buffer.action_space, spaces.Box):
        tensors.update(action_low=buffer.action_space.low, action_high=buffer.action_space.high)
    stated = {
        "class": type(buffer).__name__,
        "rows": buffer.buffer_size,
        "n_envs": buffer.n_envs,
        "pos": int(buffer.pos),
        "full": bool(buffer.full),
        "handle_timeout_termination": bool(buffer.handle_timeout_termination),
        "optimize_memory_usage": bool(buffer.optimize_memory_usage),
        "n_stack": getattr(buffer, "n_stack", 1),
    }
    return write_file(path, BUFFER, {**stated, **description}, tensors)


class BufferFile:
    """
    A replay buffer in a file of :func:`save_buffer`: checked, and read when it is asked for.

    :param path: the file
    :raises DatasetError: if it is damaged, or anything else
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self.description, self.tensors = read_file(path, BUFFER)
        stated = self.description
        numbers = [stated.get(key) for key in ("rows", "n_envs", "pos", "n_stack")]
        if not all(type(n) is int and n >= 0 for n in numbers) or stated["pos"] >= max(1, stated["rows"]):
            raise DatasetError(f"{path}: damaged: rows, environments, position and stack are {numbers}.")
        self.n_filled = stated["rows"] if stated.get("full") is True or stated.get("optimize_memory_usage") else stated["pos"]
        fronts = ("observations", "next_observations", "frames")
        rows = [key for key in self.tensors if key in ROWS or key.split("/")[0] in fronts]
        missing = set(ROWS) - set(rows)
        if missing:
            raise DatasetError(f"{path}: damaged: it has no {sorted(missing)}.")
        for key in rows:
            shape, expected = self.tensors[key].shape, (self.n_filled, stated["n_envs"])
            if shape[:2] != expected:
                raise DatasetError(f"{path}: damaged: {key} have shape {shape}, expected {expected} in front.")

    def fill(self, buffer: ReplayBuffer) -> None:
        """
        Put the content into a buffer, in the place of its own.

        :param buffer: an empty buffer of the class, the spaces and the number of rows and environments that were saved
        :raises DatasetError: if it is of another kind; then nothing has changed
        """
        stated = self.description
        here = {
            "class": type(buffer).__name__,
            "rows": buffer.buffer_size,
            "n_envs": buffer.n_envs,
            "optimize_memory_usage": bool(buffer.optimize_memory_usage),
            "n_stack": getattr(buffer, "n_stack", 1),
        }
        other = {key: (stated.get(key), value) for key, value in here.items() if stated.get(key) != value}
        if other:
            raise DatasetError(f"{self.path}: another buffer than the model's: " + _told(other))
        targets = dict(self._targets(buffer))
        wrong = {
            key: (self.tensors[key].shape[2:] if key in self.tensors else "missing", array.shape[2:])
            for key, array in targets.items()
            if key not in self.tensors or _row(self.tensors[key]) != _row(array)
        }
        if wrong:
            raise DatasetError(f"{self.path}: another buffer than the model's: " + _told(wrong))
        for key, array in targets.items():
            stored = self.tensors[key]
            for rows in parts(len(stored), int(np.prod(stored.shape[1:])) * stored.dtype.itemsize):
                array[rows] = stored[rows]
        buffer.pos, buffer.full = stated["pos"], stated["full"] is True
        if isinstance(buffer, HerReplayBuffer):
            buffer._current_ep_start[:] = np.asarray(self.tensors["current_ep_start"])
        if isinstance(buffer, FrameReplayBuffer):
            self._fill_finals(buffer)

    def _targets(self, buffer: ReplayBuffer) -> Iterator[tuple[str, np.ndarray]]:
        yield from ((key, getattr(buffer, key)) for key in ROWS)
        if isinstance(buffer, FrameReplayBuffer):
            yield from _named("frames", buffer.frames).items()
            yield from ((key, getattr(buffer, key)) for key in ("final_slot", "age", "repeated"))
            return
        yield from _named("observations", buffer.observations).items()
        if not buffer.optimize_memory_usage:
            yield from _named("next_observations", buffer.next_observations).items()
        if isinstance(buffer, HerReplayBuffer):
            yield from (("ep_start", buffer.ep_start), ("ep_length", buffer.ep_length))

    def _fill_finals(self, buffer: FrameReplayBuffer) -> None:
        chunks = {key: sorted(name for name in self.tensors if name.startswith(f"finals/{key}/")) for key in buffer.finals}
        n_chunks = {len(names) for names in chunks.values()}
        used = buffer.final_slot[buffer.final_slot >= 0]
        n_slots = FINALS * next(iter(n_chunks))
        if len(n_chunks) != 1 or len(set(used.tolist())) != len(used) or used.max(initial=-1) >= n_slots:
            raise DatasetError(f"{self.path}: damaged: the last observations of episodes are not those of its rows.")
        buffer.take_finals({key: [self.tensors[name] for name in names] for key, names in chunks.items()})
        buffer._free = sorted(set(range(n_slots)) - set(used.tolist()), reverse=True)
        for key, newest in buffer.newest.items():
            newest[:] = np.asarray(self.tensors[f"newest/{key}"])


def is_safe_path(path: Any) -> TypeGuard[str | os.PathLike[str]]:
    """
    :param path: path or open file
    :return: whether it is the path of a file that executes nothing
    """
    return isinstance(path, (str, os.PathLike)) and str(path).endswith(".safetensors")


def load_buffer(
    path: str | os.PathLike[str], make: Callable[[int], ReplayBuffer], truncate_last_traj: bool = True
) -> ReplayBuffer:
    """
    :param path: file of :func:`save_buffer`
    :param make: makes an empty buffer with room for so many transitions
    :param truncate_last_traj: for HER, whether the last trajectory in the buffer was finished
    :return: the buffer; its attribute ``offline_segments`` is there if they were written
    :raises DatasetError: if the file is damaged, or of another buffer
    """
    file = BufferFile(path)
    buffer = make(file.description["rows"] * file.description["n_envs"])
    file.fill(buffer)
    if isinstance(buffer, HerReplayBuffer) and truncate_last_traj:
        buffer.truncate_last_trajectory()
    if "offline_segments" in file.description:
        vars(buffer)["offline_segments"] = file.description["offline_segments"]
    return buffer


def save_vec_normalize(vec_normalize: VecNormalize, path: str | os.PathLike[str]) -> Path:
    """
    Write the statistics and settings of VecNormalize.

    :param vec_normalize: what to save
    :param path: file to write; ".safetensors" is added
    :return: the file
    """
    running = {"returns": vec_normalize.ret_rms}
    if vec_normalize.norm_obs:
        obs_rms: Any = vec_normalize.obs_rms
        running.update(_named("observations", obs_rms))
    tensors = {
        f"{k}:{part}": np.atleast_1d(getattr(rms, part)).astype(np.float64) for k, rms in running.items() for part in PARTS
    }
    counts = {key: float(rms.count) for key, rms in running.items()}
    settings = {key: kind(getattr(vec_normalize, key)) for key, kind in SETTINGS.items()}
    keys = None if vec_normalize.norm_obs_keys is None else list(vec_normalize.norm_obs_keys)
    return write_file(path, STATISTICS, {**settings, "counts": counts, "norm_obs_keys": keys}, tensors)


def load_vec_normalize(path: str | os.PathLike[str], venv: VecEnv) -> VecNormalize:
    """
    Wrap an environment in VecNormalize as it was saved.

    :param path: file of :func:`save_vec_normalize`
    :param venv: the environment
    :return: the wrapped environment
    :raises DatasetError: if the file is damaged, or of other observations than the environment's
    """
    stated, tensors = read_file(path, STATISTICS)
    try:
        settings: Any = {key: kind(stated[key]) for key, kind in SETTINGS.items()}
        wrapped = VecNormalize(venv, **settings, norm_obs_keys=stated["norm_obs_keys"])
        wrapped.ret_rms = _running(path, "returns", stated, tensors, ())
        if settings["norm_obs"]:
            rms: Any = wrapped.obs_rms
            names = _named("observations", rms)
            running: Any = {key: _running(path, key, stated, tensors, old.mean.shape) for key, old in names.items()}
            if isinstance(rms, dict):
                wrapped.obs_rms = {key: running[f"observations/{key}"] for key in rms}
            else:
                wrapped.obs_rms = running["observations"]
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise DatasetError(f"{path}: does not suit the environment, or is damaged: {error!r}.") from error
    return wrapped


def _running(
    path: Any, key: str, stated: dict[str, Any], tensors: Mapping[str, StoredRows], shape: tuple[int, ...]
) -> RunningMeanStd:
    running = RunningMeanStd(shape=shape)
    mean, var = (np.asarray(tensors[f"{key}:{part}"]) for part in PARTS)
    count = float(stated["counts"][key])
    if mean.shape != (shape or (1,)) or var.shape != mean.shape:
        raise DatasetError(f"{path}: the statistics of {key} have shape {mean.shape}, the environment's {shape}.")
    if not (np.isfinite(mean).all() and (var >= 0).all() and 0 < count < math.inf):
        raise DatasetError(f"{path}: damaged: the statistics of {key} are no finite numbers.")
    running.mean, running.var, running.count = mean.reshape(shape), var.reshape(shape), count
    return running


def _named(front: str, arrays: Any) -> dict[str, Any]:
    return {f"{front}/{key}": array for key, array in arrays.items()} if isinstance(arrays, Mapping) else {front: arrays}


def _row(array: Any) -> tuple[Any, ...]:
    """Shape and type of what a row holds for one environment."""
    return (*array.shape[2:], array.dtype)


def _told(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} is {a} in the file, {b} here" for key, (a, b) in pairs.items()) + "."
