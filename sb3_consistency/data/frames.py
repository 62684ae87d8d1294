"""A replay buffer that stores every frame once, in memory or in a folder: images and long logs train from disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape, is_image_space
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_consistency.data.flat import differs

#: last observations of episodes are stored in parts of so many
FINALS = 256


class FrameReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer at half its memory, or less: the next observation of a step is the observation of the next row, and
    only where there is none (at ends of episodes, and where an episode was cut by a new start) it lies in a side table.
    Unlike SB3's ``optimize_memory_usage`` it keeps time-outs apart from terminations, and takes Dict observations.

    With ``n_stack`` the newest frame of a stacked observation is stored, and stacks are put together when they are
    sampled, as ``VecFrameStack`` does: frames before an episode's first are zeros.

    :param buffer_size: number of transitions
    :param observation_space: observation space of the model (stacked, if frames are stacked)
    :param action_space: action space
    :param device: device of the samples
    :param n_envs: number of environments
    :param optimize_memory_usage: must be False: this buffer has its own way
    :param handle_timeout_termination: keep time-outs apart from terminations
    :param n_stack: number of frames that an observation stacks (along its first axis for images, which are channels first,
        and along the last for vectors); 1 for none
    :param folder: where frames are kept in files, mapped into memory, in a folder of their own that is deleted with the
        buffer; None for memory
    :param random_shift: shift sampled images at random by up to so many pixels, repeating their edges; 0 for none.
        Source: Yarats et al. 2021 (DrQ), section 3.1, with 4
    :raises ValueError: if an argument is wrong, or the space can't be stacked
    """

    observation_space: spaces.Space

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        n_stack: int = 1,
        folder: str | os.PathLike[str] | None = None,
        random_shift: int = 0,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError("optimize_memory_usage: FrameReplayBuffer stores every frame once anyway; leave it out.")
        if n_stack < 1 or random_shift < 0:
            raise ValueError(f"n_stack must be at least 1 and random_shift at least 0, got {n_stack} and {random_shift}.")
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = False
        self.handle_timeout_termination = handle_timeout_termination
        self.n_stack, self.random_shift = n_stack, random_shift
        self.folder = None if folder is None else _own_folder(self, folder)
        self.is_dict = isinstance(observation_space, spaces.Dict)
        space = observation_space
        self.entries = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        self.axes = {key: _stacked_axis(key, space, n_stack) for key, space in self.entries.items()}
        shape = (self.buffer_size, n_envs)
        self.frames = {key: self._allocate(f"frames_{i}", shape, key) for i, key in enumerate(self.entries)}
        self.finals: dict[str, list[np.ndarray]] = {key: [] for key in self.entries}
        self._free: list[int] = []
        #: slot of a row's own next observation, -1 where it is the next row's
        self.final_slot = np.full(shape, -1, np.int32)
        #: how many of the rows before belong to the episode, up to n_stack - 1
        self.age = np.zeros(shape, np.uint8 if n_stack < 256 else np.int32)
        #: rows that stand in for the one before: an offline column that is one row short
        self.repeated = np.zeros(shape, bool)
        self.newest = {key: np.zeros((n_envs, *x.shape[2:]), x.dtype) for key, x in self.frames.items()}
        self.actions = np.zeros((*shape, self.action_dim), dtype=self._maybe_cast_dtype(action_space.dtype))
        self.rewards, self.dones, self.timeouts = (np.zeros(shape, np.float32) for _ in range(3))

    # storage

    def _allocate(self, name: str, rows: tuple[int, ...], key: str) -> np.ndarray:
        space, axis = self.entries[key], self.axes[key]
        shape = [int(n) for n in get_obs_shape(space)]
        if self.n_stack > 1:
            shape[axis] //= self.n_stack
        if self.folder is None:
            return np.zeros((*rows, *shape), space.dtype)
        dtype: Any = space.dtype
        return np.memmap(os.path.join(self.folder, name), dtype=dtype, mode="w+", shape=(*rows, *shape))

    def _newest_frame(self, key: str, observations: np.ndarray) -> np.ndarray:
        """Of stacked observations (B, ...), the last frame."""
        if self.n_stack == 1:
            return observations
        axis = self._axis(key, observations)
        size = observations.shape[axis]
        return observations.take(range(size - size // self.n_stack, size), axis)

    def _axis(self, key: str, observations: np.ndarray) -> int:
        """The axis along which observations (B, ...) are stacked."""
        return self.axes[key] % (observations.ndim - 1) + 1

    def _parts(self, observations: Any) -> Iterator[tuple[str, np.ndarray]]:
        for key, space in self.entries.items():
            entry = np.asarray(observations[key] if self.is_dict else observations)
            yield key, self._newest_frame(key, entry.reshape(-1, *get_obs_shape(space)))

    def _new_slots(self, n: int) -> np.ndarray:
        while len(self._free) < n:
            first = FINALS * len(next(iter(self.finals.values())))
            for i, (key, chunks) in enumerate(self.finals.items()):
                chunks.append(self._allocate(f"finals_{i}_{len(chunks)}", (FINALS,), key))
            self._free += range(first + FINALS - 1, first - 1, -1)
        return np.array([self._free.pop() for _ in range(n)], np.int32)

    def take_finals(self, finals: Mapping[str, Sequence[Any]]) -> None:
        """
        Take over another buffer's last observations of episodes, into this one's own memory or files.

        :param finals: its ``finals``, all of whose slots are taken
        """
        self._new_slots(FINALS * len(next(iter(finals.values()))))
        for key, chunks in finals.items():
            for own, chunk in zip(self.finals[key], chunks, strict=True):
                own[:] = np.asarray(chunk)

    def _release(self, rows: Any, columns: Any) -> None:
        slots = self.final_slot[rows, columns]
        self._free += slots[slots >= 0].tolist()
        self.final_slot[rows, columns] = -1

    def _keep_final(self, row: int, column: int, frames: Mapping[str, np.ndarray]) -> None:
        slot = int(self._new_slots(1)[0])
        self.final_slot[row, column] = slot
        for key, chunks in self.finals.items():
            chunks[slot // FINALS][slot % FINALS] = frames[key]

    # writing

    @property
    def observations(self) -> Any:  # type: ignore[override]
        """The frames themselves, (rows, environments, ...), or a dict of them: whole observations if none are stacked."""
        return self.frames if self.is_dict else self.frames[""]

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        row, before = self.pos, (self.pos - 1) % self.buffer_size
        now, following = dict(self._parts(obs)), dict(self._parts(next_obs))
        self._release(row, slice(None))
        for column in range(self.n_envs):
            starts = self.size() == 0 or bool(self.dones[before, column])
            # started anew without a flag: learn() was called again, say
            starts = starts or any((now[key][column] != self.newest[key][column]).any() for key in now)
            if starts and self.size() > 0 and before != row and self.final_slot[before, column] < 0:
                self._keep_final(before, column, {key: x[column] for key, x in self.newest.items()})
            self.age[row, column] = 0 if starts else min(int(self.age[before, column]) + 1, self.n_stack - 1)
        for key, frames in self.frames.items():
            frames[row] = now[key]
            self.newest[key][:] = following[key]
        for ended in np.flatnonzero(done):
            self._keep_final(row, int(ended), {key: x[ended] for key, x in following.items()})
        self.repeated[row] = False
        self.actions[row] = np.asarray(action).reshape(self.n_envs, self.action_dim)
        self.rewards[row], self.dones[row] = reward, done
        if self.handle_timeout_termination:
            self.timeouts[row] = [info.get("TimeLimit.truncated", False) for info in infos]
        self.pos = (row + 1) % self.buffer_size
        self.full |= self.pos == 0

    def write_observations(
        self, rows: slice, column: int, observations: Any, next_observations: Any, ends: np.ndarray, first: int
    ) -> None:
        """
        Write consecutive steps of one environment into rows that are empty.

        :param rows: T rows
        :param column: number of the environment
        :param observations: (T, ...), or a dict of them
        :param next_observations: of the same structure
        :param ends: steps that the next row does not follow, (T,)
        :param first: row at which the episode of the first step starts
        """
        number = np.arange(rows.start, rows.stop)
        starts = np.maximum.accumulate(np.where(np.concatenate([[False], ends[:-1]]), number, first))
        self.age[rows, column] = np.minimum(number - starts, self.n_stack - 1)
        ends = ends.copy()
        for (_, now), (_, following) in zip(self._parts(observations), self._parts(next_observations), strict=True):
            ends[:-1] |= differs(following[:-1], now[1:])
        slots = self._new_slots(int(ends.sum()))
        self.final_slot[number[ends], column] = slots
        for key, entry in self._parts(observations):
            self.frames[key][rows, column] = entry
        last = _rows_of(next_observations, np.append(np.flatnonzero(ends), len(ends) - 1))
        for key, entry in self._parts(last):
            for slot, final in zip(slots, entry, strict=False):
                self.finals[key][slot // FINALS][slot % FINALS] = final
            self.newest[key][column] = entry[-1]

    def repeat_row(self, row: int, column: int) -> None:
        """
        Let the row after one stand in for it.

        :param row: a written row
        :param column: number of the environment
        """
        for array in (self.actions, self.rewards, self.timeouts):
            array[row + 1, column] = array[row, column]
        self.dones[row + 1, column], self.repeated[row + 1, column] = 1, True

    # reading

    def observations_at(self, rows: np.ndarray, columns: np.ndarray) -> Any:
        """
        :param rows: row numbers, (B,)
        :param columns: environments, (B,)
        :return: observations, (B, ...), or a dict of them
        """
        rows = rows - self.repeated[rows, columns]
        return self._joined({key: self._stack(key, rows, columns) for key in self.frames})

    def next_observations_at(self, rows: np.ndarray, columns: np.ndarray) -> Any:
        """
        :param rows: row numbers, (B,)
        :param columns: environments, (B,)
        :return: their next observations, (B, ...), or a dict of them
        """
        rows = rows - self.repeated[rows, columns]
        slots = self.final_slot[rows, columns]
        newest = rows == (self.pos - 1) % self.buffer_size
        found: dict[str, np.ndarray] = {}
        for key, frames in self.frames.items():
            following = frames[(rows + 1) % self.buffer_size, columns]
            for i in np.flatnonzero(slots >= 0):
                following[i] = self.finals[key][slots[i] // FINALS][slots[i] % FINALS]
            alone = newest & (slots < 0)
            following[alone] = self.newest[key][columns[alone]]
            if self.n_stack > 1:
                axis, stack = self._axis(key, following), self._stack(key, rows, columns)
                older = stack.take(range(following.shape[axis], stack.shape[axis]), axis)
                following = np.concatenate([older, following], axis)
            found[key] = following
        return self._joined(found)

    def _stack(self, key: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        frames, age = self.frames[key], self.age[rows, columns]
        if self.n_stack == 1:
            return np.asarray(frames[rows, columns])
        parts = []
        for back in range(self.n_stack - 1, -1, -1):
            part = frames[(rows - back) % self.buffer_size, columns]
            part[age < back] = 0
            parts.append(part)
        return np.concatenate(parts, self._axis(key, parts[0]))

    def _joined(self, found: dict[str, np.ndarray]) -> Any:
        return found if self.is_dict else found[""]

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
        """
        :param batch_size: number of transitions
        :param env: normalises observations and rewards
        :return: samples as SB3's buffers give them
        """
        if self.n_stack == 1 or not self.full:
            return BaseBuffer.sample(self, batch_size, env)
        # the frames before the oldest rows are overwritten
        offsets = np.random.randint(min(self.n_stack, self.buffer_size) - 1, self.buffer_size, size=batch_size)
        return self._get_samples((offsets + self.pos) % self.buffer_size, env)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Any:
        columns = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        both = (self.observations_at(batch_inds, columns), self.next_observations_at(batch_inds, columns))
        observations, following = (self._tensors(self._normalize_obs(self._shifted(x), env)) for x in both)
        dones = self.dones[batch_inds, columns] * (1 - self.timeouts[batch_inds, columns])
        rewards = self._normalize_reward(self.rewards[batch_inds, columns].reshape(-1, 1), env)
        samples = DictReplayBufferSamples if self.is_dict else ReplayBufferSamples
        return samples(
            observations,
            self.to_torch(self.actions[batch_inds, columns]),
            following,
            self.to_torch(dones.reshape(-1, 1)),
            self.to_torch(rewards),
        )

    def _tensors(self, observations: Any) -> Any:
        if isinstance(observations, dict):
            return {key: self.to_torch(x) for key, x in observations.items()}
        return self.to_torch(observations)

    def _shifted(self, observations: Any) -> Any:
        if self.random_shift == 0:
            return observations
        parts = observations if isinstance(observations, dict) else {"": observations}
        moved = {key: shift(x, self.random_shift) if is_image_space(self.entries[key]) else x for key, x in parts.items()}
        return self._joined(moved)

    # files

    def __getstate__(self) -> dict[str, Any]:
        """Frames in files go into a pickle as arrays: the folder is this process's."""
        state = dict(vars(self))
        if self.folder is not None:
            state["frames"] = {key: np.asarray(x) for key, x in self.frames.items()}
            state["finals"] = {key: [np.asarray(x) for x in chunks] for key, chunks in self.finals.items()}
            state["folder"] = None
        return state


def shift(images: np.ndarray, pad: int) -> np.ndarray:
    """
    Shift every image by its own random offset; what comes in repeats the edge.

    :param images: channels first, (B, C, H, W); windows of them, (B, n, C, H, W), have one offset each
    :param pad: largest offset, in pixels
    :return: the shifted images
    """
    shape = images.shape
    images = images.reshape(shape[0], -1, *shape[-2:])
    n, _, height, width = images.shape
    dy, dx = np.random.randint(-pad, pad + 1, size=(2, n, 1))
    rows, columns = (np.arange(height) + dy).clip(0, height - 1), (np.arange(width) + dx).clip(0, width - 1)
    last = images.transpose(0, 2, 3, 1)[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return last.transpose(0, 3, 1, 2).reshape(shape)


def _rows_of(observations: Any, rows: np.ndarray) -> Any:
    return {k: x[rows] for k, x in observations.items()} if isinstance(observations, Mapping) else observations[rows]


def _stacked_axis(key: str, space: spaces.Space, n_stack: int) -> int:
    axis = 0 if is_image_space(space) else -1
    if n_stack > 1 and (not isinstance(space, spaces.Box) or space.shape[axis] % n_stack):
        name = f"observation {key!r}" if key else "the observation"
        raise ValueError(f"n_stack={n_stack}: {name} in {space} is no stack of so many frames.")
    return axis


def _own_folder(buffer: FrameReplayBuffer, folder: str | os.PathLike[str]) -> str:
    os.makedirs(folder, exist_ok=True)
    own = tempfile.mkdtemp(prefix="frames-", dir=folder)
    weakref.finalize(buffer, shutil.rmtree, own, ignore_errors=True)
    return own
