"""What a checkpoint holds of a running model, beyond what SB3 saves, and how it is put back."""

import io
import os
import pickle
import platform
import random
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.envs.state import VecEnvState, capture_vec_env, copy_random_state, restore_vec_env
from sb3_consistency.resume.folder import Checkpoint, CheckpointError, Writer, write_checkpoint, write_shared

# arrays with a row per step, of which only the filled part is written
BUFFER_ROWS = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "dones",
    "timeouts",
    "infos",
    "ep_start",
    "ep_length",
    "frames",
    "final_slot",
    "age",
    "repeated",
)
# what a new buffer has from the model
BUFFER_STATIC = ("observation_space", "action_space", "obs_shape", "action_dim", "device", "env", "n_envs", "folder")
# counters and scores of SB3's callbacks; what their constructors take is the caller's again
CALLBACK_STATE = (
    "n_calls n_episodes last_time_trigger best_mean_reward last_mean_reward last_best_mean_reward no_improvement_evals "
    "evaluations_results evaluations_timesteps evaluations_length evaluations_successes".split()
)


# of an EvalCallback
BEST_MODEL_FOLDER, BEST_MODEL = "best_model_save_path", "best_model.zip"


def random_states() -> dict[str, Any]:
    """
    :return: states of all global random generators
    """
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """
    :param states: what :func:`random_states` returned
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if states["cuda"] is not None and th.cuda.is_available():
        th.cuda.set_rng_state_all(states["cuda"][: th.cuda.device_count()])


def buffer_state(buffer: ReplayBuffer) -> dict[str, Any]:
    """
    :param buffer: SB3 replay buffer
    :return: its content; arrays are views of the filled rows
    """
    # without an array of successors, that of the newest step lies in the next row
    rows = buffer.buffer_size if buffer.full else min(buffer.pos + int(buffer.optimize_memory_usage), buffer.buffer_size)
    content: dict[str, Any] = {}
    # frames in files are arrays there
    state: Any = buffer.__getstate__()
    for name, value in state.items():
        if name in BUFFER_ROWS:
            value = {k: x[:rows] for k, x in value.items()} if isinstance(value, dict) else value[:rows]
        if name not in BUFFER_STATIC:
            content[name] = value
    return {"class": type(buffer).__name__, "rows": rows, "content": content}


def restore_buffer(model: Any, state: dict[str, Any]) -> ReplayBuffer:
    """
    :param model: the model that the buffer is for
    :param state: what :func:`buffer_state` returned
    :return: a new buffer with this content
    :raises CheckpointError: if the model's buffers are of another class
    """
    content, rows = state["content"], state["rows"]
    buffer: ReplayBuffer = model.new_buffer(content["buffer_size"] * model.n_envs)
    if type(buffer).__name__ != state["class"]:
        raise CheckpointError(f"replay_buffer_class: the checkpoint has a {state['class']}, got {type(buffer).__name__}.")
    in_files = isinstance(buffer, FrameReplayBuffer) and buffer.folder is not None
    for name, value in content.items():
        if name == "finals" and isinstance(buffer, FrameReplayBuffer):
            buffer.take_finals(value)
        elif name not in BUFFER_ROWS or (rows == buffer.buffer_size and not (in_files and name == "frames")):
            setattr(buffer, name, value)
        elif isinstance(value, dict):
            for key, array in value.items():
                getattr(buffer, name)[key][: len(array)] = array
        else:
            getattr(buffer, name)[: len(value)] = value
    return buffer


def truncate_last_episodes(buffer: ReplayBuffer) -> None:
    """
    Mark the episodes that the newest rows belong to as cut off by a time limit, unless they are over.

    :param buffer: buffer of online experience
    """
    if isinstance(buffer, HerReplayBuffer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            buffer.truncate_last_trajectory()
    elif buffer.size() > 0:
        last = (buffer.pos - 1) % buffer.buffer_size
        cut = buffer.dones[last] == 0
        buffer.dones[last, cut] = 1
        if buffer.handle_timeout_termination:
            buffer.timeouts[last, cut] = 1


def callback_tree(callback: Any) -> Iterator[BaseCallback]:
    """
    :param callback: a callback, or None
    :return: it and all callbacks inside it
    """
    if callback is not None:
        yield callback
        children = [*getattr(callback, "callbacks", ()), getattr(callback, "callback", None)]
        for child in (*children, getattr(callback, "callback_on_new_best", None)):
            if isinstance(child, BaseCallback):
                yield from callback_tree(child)


def callback_states(root: BaseCallback | None) -> list[tuple[str, dict[str, Any]]]:
    """
    :param root: a run's tree of callbacks
    :return: class and counters of each, and where it keeps the best model
    """
    states = []
    for callback in callback_tree(root):
        state = {k: vars(callback)[k] for k in CALLBACK_STATE if k in vars(callback)}
        folder = vars(callback).get(BEST_MODEL_FOLDER)
        states.append((type(callback).__name__, state | ({BEST_MODEL_FOLDER: os.path.abspath(folder)} if folder else {})))
    return states


def restore_callbacks(root: BaseCallback | None, states: list[tuple[str, dict[str, Any]]]) -> None:
    """
    Let the callbacks count on where those of the same class, in the same order, stopped.

    :param root: the tree of callbacks of the continued run
    :param states: what :func:`callback_states` returned
    """
    left = list(states)
    for callback in callback_tree(root):
        for entry in left:
            if entry[0] == type(callback).__name__:
                counters = dict(entry[1])
                folder = counters.pop(BEST_MODEL_FOLDER, None)
                vars(callback).update(counters)
                _take_best_model(callback, folder)
                left.remove(entry)
                break


def _take_best_model(callback: BaseCallback, earlier: str | None) -> None:
    """The best score that a callback goes on with is that of a model: in a new folder it needs the model, too."""
    folder = vars(callback).get(BEST_MODEL_FOLDER)
    if folder is None or os.path.exists(os.path.join(folder, BEST_MODEL)):
        return
    if earlier is not None and os.path.exists(os.path.join(earlier, BEST_MODEL)):
        os.makedirs(folder, exist_ok=True)
        shutil.copy(os.path.join(earlier, BEST_MODEL), folder)
    else:
        vars(callback)["best_mean_reward"] = -np.inf


def environment_facts(model: Any) -> dict[str, Any]:
    """
    :param model: a model
    :return: what the bits of a continued run depend on, beside the checkpoint
    """
    facts: dict[str, Any] = {"python": platform.python_version()}
    for package in ("sb3-consistency", "stable-baselines3", "torch", "numpy", "gymnasium", "mujoco"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return {**facts, "device": model.device.type, "threads": th.get_num_threads()}


def save_checkpoint(model: Any, folder: Path, keep: int) -> Path:
    """
    Write a checkpoint; only between two rollouts (or chunks of offline batches) is it one to continue from exactly.

    :param model: the model, in a running ``learn`` or ``pretrain``
    :param folder: folder of checkpoints
    :param keep: checkpoints to keep
    :return: the checkpoint's folder
    :raises OSError: if it can't be written
    """
    model.run.id = model.run.id or uuid.uuid4().hex
    env_state = None if model.env is None else capture_vec_env(model.env)
    spaces = (model.observation_space, model.action_space)
    state = {
        "phase": "offline" if model.in_offline_phase else "online",
        "random": random_states(),
        "env": env_state,
        "spaces": spaces,
        "spaces_of_env": model.env is not None and model.action_space is model.env.action_space,
        "elapsed": time.time_ns() - int(model.start_time),
        "callbacks": callback_states(model.resumption.root_callback),
        "data": model.data.facts(),
        "memory": None if model.memory is None else model.memory.to("cpu"),
    }
    writers: dict[str, Writer] = {"model.zip": lambda file: _write_model(model, file), "state.pkl": _pickled(state)}
    if model.replay_buffer is not None and not model.data.in_replay:
        writers["replay_buffer.pkl"] = _pickled(buffer_state(model.replay_buffer))
    facts = {
        "class": f"{type(model).__module__}:{type(model).__qualname__}",
        "run": model.run.id,
        "phase": state["phase"],
        "num_timesteps": int(model.num_timesteps),
        "n_updates": int(model._n_updates),
        "new_episode": None if env_state is None else env_state.reason,
        "environment": environment_facts(model),
    }
    shared = {} if model.data.buffer is None else {"dataset.pkl": _dataset_entry(model, folder)}
    return write_checkpoint(folder, writers, shared, facts, keep)


def _pickled(value: Any) -> Writer:
    return lambda file: pickle.dump(value, file, protocol=5)


def _write_model(model: Any, file: Any) -> None:
    # zip files are not written from front to back
    archive = io.BytesIO()
    model.save(archive)
    file.write(archive.getbuffer())


def _dataset_entry(model: Any, folder: Path) -> dict[str, Any]:
    """Write the offline data once per folder: it does not change, and may be the largest part."""
    buffer = model.data.buffer
    if model.resumption.dataset_file is not None:
        written, place, entry = model.resumption.dataset_file
        if written is buffer and place == folder.resolve() and (folder / os.path.basename(entry["path"])).is_file():
            return dict(entry)
    entry = write_shared(folder, "dataset", _pickled({"buffer": buffer_state(buffer), "heldout": model.data.heldout}))
    model.resumption.dataset_file = (buffer, folder.resolve(), entry)
    return entry


def restore_run(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Put back what SB3's ``load`` leaves out: buffers, environments, random states.

    :param model: model loaded from the checkpoint's ``model.zip``, without resetting
    :param checkpoint: the checkpoint
    :return: its ``state.pkl``, with what continuing the run takes
    :raises CheckpointError: if the environment is not made as the interrupted run's was
    """
    state = _unpickled(checkpoint, "state.pkl")
    env_state: VecEnvState | None = state["env"]
    if model.env is not None and env_state is not None:
        restore_vec_env(model.env, env_state)
    if model.env is not None and state["spaces_of_env"]:
        # one random generator, as in the interrupted run
        model.observation_space, model.action_space = model.env.observation_space, model.env.action_space
    else:
        for source, target in zip(state["spaces"], (model.observation_space, model.action_space), strict=True):
            copy_random_state(source, target)
    for name, value in state["data"].items():
        setattr(model.data, name, value)
    memory = state.get("memory")
    model.memory = None if memory is None else memory.to(model.device)
    if checkpoint.file("replay_buffer.pkl") is not None:
        model.replay_buffer = restore_buffer(model, _unpickled(checkpoint, "replay_buffer.pkl"))
    if checkpoint.file("dataset.pkl") is not None:
        _restore_dataset(model, checkpoint)
    set_random_states(state["random"])
    reason = None if env_state is None else env_state.reason
    if reason is not None and model.env is not None and model._last_obs is not None:
        _start_new_episodes(model, reason)
        state["random"] = random_states()
    return state


def _unpickled(checkpoint: Checkpoint, name: str) -> Any:
    path = checkpoint.file(name)
    assert path is not None
    with open(path, "rb") as file:
        return pickle.load(file)


def _restore_dataset(model: Any, checkpoint: Checkpoint) -> None:
    data = _unpickled(checkpoint, "dataset.pkl")
    buffer = restore_buffer(model, data["buffer"])
    model.data.restore(buffer, data["heldout"])
    windows = (data["heldout"] or {}).get("windows")
    if windows is not None:
        windows.buffer.device = model.device
    model.resumption.dataset_file = (buffer, checkpoint.path.parent.resolve(), checkpoint.manifest["files"]["dataset.pkl"])


def _start_new_episodes(model: Any, reason: str) -> None:
    """The environment's state is lost: what was stored of the running episodes stays, marked as cut off."""
    warnings.warn(
        f"The environment's state could not be captured ({reason}): the run continues with a new episode, and the one that "
        "was cut is marked truncated in the replay buffer. The result will differ from that of an uninterrupted run.",
        stacklevel=5,
    )
    if model.replay_buffer is not None and not model.data.in_replay:
        truncate_last_episodes(model.replay_buffer)
    # else every resumed run would repeat the first episodes
    model.env.seed(int(np.random.randint(2**31 - 1)))
    model._last_obs, model.memory = model.env.reset(), None
    model._last_episode_starts = np.ones((model.env.num_envs,), dtype=bool)
    if model._vec_normalize_env is not None:
        model._last_original_obs = model._vec_normalize_env.get_original_obs()
    if model.action_noise is not None:
        model.action_noise.reset()
