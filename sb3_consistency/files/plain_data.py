"""Values as plain JSON data and back: numbers, texts, lists, Gymnasium spaces, and classes by allow-listed names only."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.frames import FrameReplayBuffer
from sb3_consistency.data.rewards import AffineReward
from sb3_consistency.generative.networks import Mish

_ACTIVATIONS = """
    CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU
    SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
"""
_OPTIMIZERS = "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD"
#: the only classes that a file can name
CLASSES: dict[str, type] = {
    **{f"torch.nn.{name}": getattr(th.nn, name) for name in _ACTIVATIONS.split()},
    **{f"torch.optim.{name}": getattr(th.optim, name) for name in _OPTIMIZERS.split()},
    **{f"stable_baselines3.{c.__name__}": c for c in (FlattenExtractor, NatureCNN, CombinedExtractor)},
    **{f"stable_baselines3.{c.__name__}": c for c in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)},
    "torch.nn.Mish": th.nn.Mish,
    **{f"sb3_consistency.{c.__name__}": c for c in (Mish, FrameReplayBuffer)},
}
_NAMES = {cls: name for name, cls in CLASSES.items()}
_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
# far above any real option: numbers of layers, candidates, steps; a file can't make us allocate what it does not contain
MAX_INTEGER, MAX_LENGTH, MAX_SPACE_SIZE = 10**6, 10**4, 2**22


def encode(name: str, value: Any) -> Any:
    """
    :param name: name of the argument, for the message
    :param value: plain data, a tuple, an allow-listed class, or a dict or list of these
    :return: the value for ``json.dumps``
    :raises ValueError: if it is not plain data
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        return float(value)
    if type(value) is ConstantSchedule:  # what rl-zoo3 makes of a learning rate
        return encode(name, value.val)
    if isinstance(value, GoalSelectionStrategy):
        return value.name.lower()
    if isinstance(value, type) and value in _NAMES:
        return {"class": _NAMES[value]}
    if type(value) is AffineReward:
        return {"affine": [value.scale, value.shift]}
    if isinstance(value, tuple):
        return {"tuple": [encode(name, entry) for entry in value]}
    if isinstance(value, list):
        return [encode(name, entry) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(f"{name}[{key!r}]", entry) for key, entry in value.items()}}
    raise ValueError(
        f"{name}: {value!r} is not plain data (numbers, texts, lists, SB3's and PyTorch's own classes), so a safe file can't "
        f"hold it. Set it to plain data (or None) before save_safe(), and again after load_safe(); or use save()."
    )


def decode(value: Any) -> Any:
    """
    :param value: what :func:`encode` returned
    :return: the value
    :raises ValueError: if it names a class that is not allowed, or is nothing that ``encode`` writes
    """
    if isinstance(value, list):
        return [decode(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "class":
            if not isinstance(content, str) or content not in CLASSES:
                raise ValueError(f"{content!r} is none of the classes that a safe file can name")
            return CLASSES[content]
        if tag == "affine" and isinstance(content, list):
            return AffineReward(*(float(number) for number in content))
        if tag == "tuple" and isinstance(content, list):
            return tuple(decode(entry) for entry in content)
        if tag == "dict" and isinstance(content, dict):
            return {key: decode(entry) for key, entry in content.items()}
    raise ValueError(f"unknown entry {str(value)[:100]}")


def check_sizes(name: str, value: Any) -> None:
    """
    Refuse sizes that would make building the networks expensive, whatever the file's own size.

    :param name: name of the option
    :param value: decoded value
    :raises ValueError: if an integer or a list inside is too large
    """
    if isinstance(value, (list, tuple, dict)):
        if len(value) > MAX_LENGTH:
            raise ValueError(f"{name} has {len(value)} entries")
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            check_sizes(f"{name}[{key!r}]", entry)
    elif isinstance(value, (int, float)) and not name.endswith("['noise_seed']") and abs(value) > MAX_INTEGER:
        raise ValueError(f"{name}={value} is too large")


def encode_space(name: str, space: spaces.Space) -> dict[str, Any]:
    """
    :param name: name of the space, for the message
    :param space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :return: the space for ``json.dumps``
    :raises ValueError: if it is of another kind
    """
    if type(space) is spaces.Dict:
        return {"kind": "Dict", "spaces": {k: encode_space(f"{name}[{k!r}]", s) for k, s in space.spaces.items()}}
    if type(space) is spaces.Box:
        bounds = {key: _encode_bounds(getattr(space, key)) for key in ("low", "high")}
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if type(space) is spaces.Discrete:
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if type(space) is spaces.MultiDiscrete:
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if type(space) is spaces.MultiBinary:
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
    raise ValueError(f"{name}: a {type(space).__name__} can't be written to a safe file; use save().")


def decode_space(data: dict[str, Any]) -> spaces.Space:
    """
    :param data: what :func:`encode_space` returned
    :return: the space
    :raises ValueError: if it is nothing that ``encode_space`` writes, or too large
    """
    kind = data["kind"]
    if kind == "Dict":
        # pairs: a dict would be sorted, and extractors concatenate in the space's order
        return spaces.Dict([(str(key), decode_space(entry)) for key, entry in data["spaces"].items()])
    if kind == "Box":
        if data["dtype"] not in _DTYPES:
            raise ValueError(f"dtype {data['dtype']!r} of a Box")
        shape = _checked_shape(data["shape"])
        dtype = np.dtype(data["dtype"])
        low, high = (_decode_bounds(data[key], shape, dtype) for key in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(int(data["n"]), start=int(data["start"]))
    if kind == "MultiDiscrete":
        nvec = np.array(data["nvec"], dtype=np.int64)
        return spaces.MultiDiscrete(nvec, start=np.array(data["start"], dtype=np.int64))
    if kind == "MultiBinary":
        shape = _checked_shape(data["n"] if isinstance(data["n"], list) else [data["n"]])
        return spaces.MultiBinary(list(shape) if isinstance(data["n"], list) else shape[0])
    raise ValueError(f"unknown kind of space {kind!r}")


def space_size(data: dict[str, Any]) -> int:
    """
    :param data: what :func:`encode_space` returned
    :return: size of an observation as the networks see it, one-hot where it is discrete; nothing is allocated
    :raises ValueError: if it is nothing that ``encode_space`` writes
    """
    kind = data["kind"]
    if kind == "Dict":
        return sum(space_size(entry) for entry in data["spaces"].values())
    stated = data["shape" if kind == "Box" else "nvec" if kind == "MultiDiscrete" else "n"]
    sizes: list[int] = np.ravel(np.array(stated, dtype=object)).tolist()
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"a {kind} of {stated}")
    return sum(sizes) if kind in ("Discrete", "MultiDiscrete") else math.prod(sizes)


def _encode_bounds(bounds: np.ndarray) -> Any:
    values = np.unique(bounds)
    # JSON has no infinity; one number stands for equal bounds, or images would fill the file
    texts = [str(x) if not math.isfinite(x) else x for x in (values if len(values) == 1 else bounds.ravel()).tolist()]
    return texts[0] if len(values) == 1 else texts


def _decode_bounds(data: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not isinstance(data, list):
        return np.full(shape, float(data) if isinstance(data, str) else data, dtype=dtype)
    return np.array([float(x) if isinstance(x, str) else x for x in data], dtype=dtype).reshape(shape)


def _checked_shape(shape: list[int]) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"a space of shape {shape}")
    return tuple(shape)
