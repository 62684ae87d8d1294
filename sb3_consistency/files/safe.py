"""
Models as files that execute nothing: weights and plain data in one safetensors file.

SB3's ``save`` pickles, and unpickling a stranger's file runs whatever its author put there. Here the configuration is JSON,
in the header of the safetensors file; classes are looked up by name in a list of ours, nothing is imported.
"""

import hashlib
import json
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency import registry
from sb3_consistency.data.rewards import AffineReward
from sb3_consistency.data.safe_file import ENTRY, replacing
from sb3_consistency.envs.spaces import adopted_spaces, check_action_space, check_observation_space
from sb3_consistency.files.allocation import AllocationLimit
from sb3_consistency.files.plain_data import (
    MAX_SPACE_SIZE,
    check_sizes,
    decode,
    decode_space,
    encode,
    encode_space,
    space_size,
)
from sb3_consistency.files.run import Run
from sb3_consistency.options import MISSING, Option, check_flags, check_pair, check_range, options_of

FORMAT = "sb3_consistency 1"
SUFFIX = ".safetensors"
ALGORITHMS = tuple(registry.ALGORITHMS)
MAX_HEADER = 2**24
# HER keeps a dict per row
MAX_BUFFER_SIZE = 10**7
COUNTERS = ("num_timesteps", "_n_updates", "_total_timesteps", "_num_timesteps_at_start", "_episode_num")
#: of a run, what belongs to one process alone
RUN_LEFT_OUT = ("algorithm", "inferred_spaces", "call", "id", "counts_before_pretraining")
RUN_FACTS = {f"run.{f.name}": f for f in fields(Run) if f.name not in RUN_LEFT_OUT}
RUN_COUNTERS = tuple(name for name, f in RUN_FACTS.items() if f.type == int | None)
RUN_FLAGS = {name: f.type is not bool for name, f in RUN_FACTS.items() if f.type in (bool, bool | None)}


class SafeLoadError(ValueError):
    """A file that :func:`load_safe` refuses. The message names what is wrong with it."""


def save_safe(model: Any, path: str | Path) -> Path:
    """
    Write a model to a file that can be read without executing anything.

    Weights, optimizer states, observation statistics, constructor arguments and counters are stored; data, replay buffer,
    ``VecNormalize`` statistics, paths and loggers are not. An existing file is replaced at once, or stays as it was.

    :param model: model of one of this package's algorithms
    :param path: file to write; ".safetensors" is added where it is missing
    :return: the path
    :raises ValueError: if an argument of the model is not plain data, or a weight is not finite
    """
    model.take_policy_options()
    path = Path(path)
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if not th.isfinite(tensor).all():
            raise ValueError(f"model: {name} has NaN or infinite values; the training has diverged, take an earlier model.")
    config = json.dumps(_config(model), allow_nan=False)
    metadata = {"format": FORMAT, "config": config, "sha256": _digest(config, tensors)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


def load_safe(path: str | Path, env: GymEnv | str | None = None, device: th.device | str = "auto") -> Any:
    """
    Load a model that ``save_safe`` wrote, executing nothing from the file.

    The algorithm is picked by its name among this package's. Predictions equal those of the saved model, and training goes
    on with its optimizer states.

    :param path: file of ``save_safe``
    :param env: environment to train in, or its id; None to predict, or to train offline
    :param device: device to load to
    :return: the model
    :raises SafeLoadError: if the file is damaged, is no such file, or asks for anything that is not allowed
    :raises ValueError: if the environment's spaces are not the model's
    """
    return _load(path, env, device, None)


def load_safe_as(cls: type[Any], path: str | Path, env: GymEnv | str | None, device: th.device | str) -> Any:
    """
    :func:`load_safe` for one algorithm.

    :param cls: the algorithm; another one's file is refused
    :param path: file of ``save_safe``
    :param env: environment to train in, its id, or None
    :param device: device to load to
    :return: the model
    :raises SafeLoadError: as :func:`load_safe`, and if the file holds another algorithm
    """
    return _load(path, env, device, cls)


# writing


def _config(model: Any) -> dict[str, Any]:
    cls = type(model)
    if _algorithm(cls.__name__) is not cls:
        raise ValueError(f"model: {cls.__name__} is not one of {list(ALGORITHMS)} itself; save_safe() knows no subclasses.")
    policies = {policy: name for name, policy in cls.policy_aliases.items()}
    if model.policy_class not in policies:
        raise ValueError(
            f"policy: {model.policy_class.__name__} is a class of your own, and load_safe() makes only "
            f"{sorted(policies.values())}. Use save(), or export()."
        )
    arguments = {name: encode(name, value) for name, value in _arguments(model).items()}
    _checked_arguments(cls, arguments)  # now, and not when the model is needed
    return {
        "algorithm": cls.__name__,
        "policy": policies[model.policy_class],
        "observation_space": encode_space("observation_space", model.observation_space),
        "action_space": encode_space("action_space", model.action_space),
        "inferred_spaces": list(model.run.inferred_spaces),
        "arguments": arguments,
        "state": {name: encode(name, value) for name, value in _state(model).items()},
        "learning_rates": {
            name: [float(group["lr"]) for group in optimizer.param_groups] for name, optimizer in _optimizers(model).items()
        },
    }


def _stored_options(cls: type[Any]) -> dict[str, Option]:
    # paths and data stay behind: a stranger's file must not choose what learn() reads (perhaps a pickle), where it writes, or
    # that it runs a compiler
    return {name: o for name, o in options_of(cls).items() if o.stored}


def _arguments(model: Any) -> dict[str, Any]:
    values = {name: vars(model)[o.attribute] for name, o in _stored_options(type(model)).items()}
    values["train_freq"] = (model.train_freq.frequency, model.train_freq.unit.value)
    if model.run.n_step_class_is_derived or values["replay_buffer_class"] in (ReplayBuffer, DictReplayBuffer):
        kwargs = values["replay_buffer_kwargs"].items()
        derived = values["replay_buffer_class"] is NStepReplayBuffer
        values["replay_buffer_kwargs"] = {k: v for k, v in kwargs if not (derived and k in ("n_steps", "gamma"))}
        values["replay_buffer_class"] = None
    # a path of this machine
    values["replay_buffer_kwargs"] = {k: v for k, v in values["replay_buffer_kwargs"].items() if k != "folder"}
    if values.get("teacher") is not None:
        values["teacher"] = "taken over before saving"
    return values


def _state(model: Any) -> dict[str, Any]:
    run = {name: value for name, value in vars(model.run).items() if name not in RUN_LEFT_OUT}
    counters = {name: vars(model)[name] for name in (*COUNTERS, "_current_progress_remaining")}
    return {**counters, **{f"run.{name}": value for name, value in run.items()}}


def _tensors(model: Any) -> dict[str, th.Tensor]:
    # copies: networks may share an extractor, and safetensors stores no tensor twice
    tensors = {f"policy.{name}": w.detach().cpu().clone().contiguous() for name, w in model.policy.state_dict().items()}
    tensors |= {f"variable.{name}": x.detach().cpu().clone() for name, x in _variables(model).items()}
    for owner, optimizer in _optimizers(model).items():
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                if value is not None:
                    array = th.as_tensor(value, dtype=None if isinstance(value, th.Tensor) else th.float64)
                    tensors[f"optimizer.{owner}.{index}.{key}"] = array.detach().cpu().clone().contiguous()
    return tensors


def _optimizers(model: Any) -> dict[str, th.optim.Optimizer]:
    """Those of the networks by the networks' names, others by their own."""
    names = [name for name in model._get_torch_save_params()[0] if name != "policy"]
    return {name.removesuffix(".optimizer"): attrgetter(name)(model) for name in names}


def _variables(model: Any) -> dict[str, th.Tensor]:
    """What is trained beside the networks."""
    return {name: attrgetter(name)(model) for name in model._get_torch_save_params()[1]}


def _digest(config: str, tensors: dict[str, th.Tensor]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(tensors[name].numpy()).tobytes())
    return digest.hexdigest()


# reading


def _load(path: str | Path, env: GymEnv | str | None, device: th.device | str, cls: type[Any] | None) -> Any:
    path = Path(path)
    config, tensors = _read(path)
    try:
        name = config["algorithm"]
        found = _algorithm(name)
        if found is None:
            raise ValueError(f"algorithm {str(name)[:100]!r} is none of {list(ALGORITHMS)}")
        if cls is not None and found is not cls:
            raise ValueError(f"it holds a {name}: load it with {name}.load_safe() or sb3_consistency.load_safe()")
        arguments = _checked_arguments(found, config["arguments"])
        described = [config[f"{kind}_space"] for kind in ("observation", "action")]
        if sum(map(space_size, described)) > MAX_SPACE_SIZE:
            raise ValueError(f"spaces of more than {MAX_SPACE_SIZE} numbers")
        space_pair = [decode_space(space) for space in described]
        check_observation_space(space_pair[0])
        check_action_space(space_pair[1])
        inferred = [name for name in ("observation_space", "action_space") if name in config.get("inferred_spaces", [])]
        policy = config["policy"]
        if policy not in found.policy_aliases:
            raise ValueError(f"policy {str(policy)[:100]!r} is none of {sorted(found.policy_aliases)}")
        state = _checked_state(config["state"])
    except Exception as error:  # of any kind: the entries of a stranger's file may be anything
        raise SafeLoadError(f"{path}: the configuration can't be used: {_told(error)}") from error
    model = _build(path, found, policy, arguments, space_pair, inferred, env, device)
    for name, value in state.items():
        vars(model.run if name.startswith("run.") else model)[name.removeprefix("run.")] = value
    _set_up(path, model, tensors)
    _fill(path, model, tensors, config.get("learning_rates"))
    return model


def _told(error: Exception) -> str:
    return f"{error}." if isinstance(error, ValueError) else f"{error!r}."


def _algorithm(name: Any) -> Any:
    return registry.algorithm(name) if name in ALGORITHMS else None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    if not path.is_file() and path.with_name(path.name + SUFFIX).is_file():
        path = path.with_name(path.name + SUFFIX)
    if not path.is_file():
        raise SafeLoadError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"
    if not is_safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise SafeLoadError(f"{path}: this is a zip file or a pickle, not a file of save_safe(); nothing was unpickled.")
    if not is_safetensors or int.from_bytes(start[:8], "little") > MAX_HEADER:
        raise SafeLoadError(f"{path}: damaged, or not a file of save_safe(): the header is missing or too long.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if ENTRY in metadata:
            kind = str(json.loads(metadata[ENTRY]).get("kind"))[:40]
            raise SafeLoadError(f"{path}: no model but a {kind}: load_replay_buffer() and load_vec_normalize() read these.")
        if metadata.get("format") != FORMAT:
            raise SafeLoadError(
                f"{path}: format {metadata.get('format')!r}, but {FORMAT!r} is expected: not from save_safe()."
            )
        config = json.loads(metadata["config"], parse_constant=_refuse_constant)
        digest = _digest(metadata["config"], tensors)
    except SafeLoadError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError, RuntimeError, TypeError) as error:
        raise SafeLoadError(f"{path}: damaged, or not a file of save_safe(): {error!r}.") from error
    if metadata.get("sha256") != digest:
        raise SafeLoadError(f"{path}: damaged: the checksum of its content is not the one it states.")
    if not isinstance(config, dict):
        raise SafeLoadError(f"{path}: the configuration is a {type(config).__name__}, not an object.")
    for name, tensor in tensors.items():
        if not th.isfinite(tensor).all():
            raise SafeLoadError(f"{path}: {name!r} has NaN or infinite values.")
    return config, tensors


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _checked_arguments(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    declared = _stored_options(cls)
    later = {name: o.before for name, o in declared.items() if o.before is not MISSING and name not in given}
    _check_names("arguments", {*given, *later}, set(declared))
    arguments = {**{name: decode(value) for name, value in given.items()}, **later}
    for name, value in arguments.items():
        if declared[name].size:
            check_sizes(name, value)
    if arguments["buffer_size"] > MAX_BUFFER_SIZE:
        raise ValueError(f"buffer_size={arguments['buffer_size']} is too large")
    buffer_class = arguments["replay_buffer_class"]
    if arguments["action_noise"] is not None or (buffer_class is not None and not issubclass(buffer_class, ReplayBuffer)):
        raise ValueError("action_noise and replay_buffer_class must be None or a replay buffer")
    if "folder" in (arguments["replay_buffer_kwargs"] or {}):
        raise ValueError("replay_buffer_kwargs has a folder: a file does not choose where this machine writes")
    return arguments


def _checked_state(given: dict[str, Any]) -> dict[str, Any]:
    # what a file of before does not know of is as it is in a new run
    new_run: dict[str, Any] = {name: f.default for name, f in RUN_FACTS.items()}
    _check_names("state", {*given, *new_run}, {*COUNTERS, "_current_progress_remaining", *new_run})
    state = new_run | {name: decode(value) for name, value in given.items()}
    for name in (*COUNTERS, *RUN_COUNTERS):
        may_be_none = name in RUN_COUNTERS
        if not (type(state[name]) is int and state[name] >= 0) and not (state[name] is None and may_be_none):
            raise ValueError(f"{name} must be an integer of at least 0, got {state[name]!r}")
    check_range("_current_progress_remaining", state["_current_progress_remaining"], -1e9, 1)
    for name, optional in RUN_FLAGS.items():
        check_flags(optional=optional, **{name: state[name]})
    if state["run.reference_returns"] is not None:
        check_pair("reference_returns", state["run.reference_returns"], -1e300)
    if not (state["run.reward_function"] is None or type(state["run.reward_function"]) is AffineReward):
        raise ValueError("reward_function must be None or a scale and a shift")
    return state


def _check_names(what: str, given: set[str], expected: set[str]) -> None:
    if given != expected:
        raise ValueError(
            f"{what}: missing {sorted(expected - given)}, unknown {sorted(given - expected)} (perhaps of another version)"
        )


def _build(
    path: Path,
    cls: type[Any],
    policy: str,
    arguments: dict[str, Any],
    space_pair: list[Any],
    inferred: list[str],
    env: Any,
    device: Any,
) -> Any:
    # the constructor checks every argument; it builds no network and no buffer yet, and opens nothing
    try:
        model = cls(policy, None, **arguments, device=device, _init_setup_model=False)
    except Exception as error:  # as above
        raise SafeLoadError(f"{path}: {cls.__name__} refuses the arguments: {_told(error)}") from error
    if env is None and issubclass(arguments["replay_buffer_class"] or ReplayBuffer, HerReplayBuffer):
        raise SafeLoadError(f"{path}: env is None: pass it, the model's HerReplayBuffer asks the environment for rewards.")
    model.observation_space, model.action_space = space_pair
    model.n_envs = 1
    model.run.inferred_spaces = inferred if env is None else []
    if env is not None:
        env = model._wrap_env(maybe_make_env(env, 0), model.verbose)
        vars(model).update(adopted_spaces({name: getattr(model, name) for name in inferred}, env))
        check_for_correct_spaces(env, model.observation_space, model.action_space)
        model.env, model.n_envs = env, env.num_envs
        model._vec_normalize_env = unwrap_vec_normalize(env)
    return model


def _set_up(path: Path, model: Any, tensors: dict[str, th.Tensor]) -> None:
    """Build networks and buffer, and put the weights in."""
    ours = {name.removeprefix("policy."): w for name, w in tensors.items() if name.startswith("policy.")}
    try:
        # a few lines of configuration can ask for more memory than there is; initialisation needs little beyond the weights
        with AllocationLimit(4 * sum(w.numel() for w in ours.values()) + 2**22):
            model._setup_model()
        expected = model.policy.state_dict()
        _check_names("weights", set(ours), set(expected))
        for name, w in ours.items():
            if (w.shape, w.dtype) != (expected[name].shape, expected[name].dtype):
                raise ValueError(
                    f"{name!r} has shape {tuple(w.shape)} ({w.dtype}), expected {tuple(expected[name].shape)} "
                    f"({expected[name].dtype})"
                )
        model.policy.load_state_dict(ours)
    except Exception as error:  # as above; MemoryError where the buffer is too large
        raise SafeLoadError(f"{path}: the weights don't fit the configuration: {_told(error)}") from error


def _fill(path: Path, model: Any, tensors: dict[str, th.Tensor], rates: Any) -> None:
    optimizers, variables = _optimizers(model), _variables(model)
    states: dict[str, dict[int, dict[str, th.Tensor]]] = {name: {} for name in optimizers}
    try:
        _check_names("variables", {n.removeprefix("variable.") for n in tensors if n.startswith("variable.")}, set(variables))
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                owner, index, key = rest.split(".", 2)
                states[owner].setdefault(int(index), {})[key] = value
            elif kind == "variable":
                _fill_variable(rest, variables[rest], value)
            elif kind != "policy":
                raise ValueError(f"unknown tensor {name!r}")
        for owner, state in states.items():
            _fill_optimizer(owner, optimizers[owner], state, rates[owner])
    except Exception as error:  # as above
        raise SafeLoadError(f"{path}: the optimizer state can't be used: {_told(error)}") from error


def _fill_variable(name: str, variable: th.Tensor, value: th.Tensor) -> None:
    if (value.shape, value.dtype) != (variable.shape, variable.dtype):
        raise ValueError(f"{name} has shape {tuple(value.shape)} ({value.dtype}), expected {tuple(variable.shape)}")
    with th.no_grad():
        variable.copy_(value)


def _fill_optimizer(network: str, optimizer: th.optim.Optimizer, state: dict[int, Any], rates: list[float]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        shape = parameters[index].shape
        for key, value in entries.items():
            if value.shape not in (shape, th.Size([])):
                raise ValueError(
                    f"{key} of parameter {index} of {network} has shape {tuple(value.shape)}, expected {tuple(shape)}"
                )
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        check_range(f"learning rate of {network}", rate, 0)
        group["lr"] = float(rate)
    # in the order in which optimizers write it
    ordered = {i: dict(sorted(state[i].items(), key=lambda entry: (entry[0] != "step", entry[0]))) for i in sorted(state)}
    optimizer.load_state_dict({"state": ordered, "param_groups": groups})
