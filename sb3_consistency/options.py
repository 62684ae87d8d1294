"""The constructor arguments that all algorithms share, declared and documented once."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule, TrainFrequencyUnit

from sb3_consistency.training.gradient import PRECISIONS

# a constant, or a function of the number of gradient steps taken so far
StepSchedule = float | Callable[[int], float]


class SharedArguments(TypedDict, total=False):
    """
    SB3's arguments keep SAC's names and defaults; see :class:`stable_baselines3.SAC` for those not listed.

    :param actor_learning_rate: learning rate (or schedule) of the actor; None for ``learning_rate``, in offline runs of
        actor-critics for 3e-3
    :param cosine_lr_decay: multiply the learning rates by a cosine that falls to 0 over each run; None for offline runs only
    :param max_grad_norm: clip the gradient of every network to this norm
    :param curriculum_steps: gradient steps over which curricula (the number of noise levels) run; None for the length
        of the first offline phase; online without one, they stand at their end
    :param dataset: data that ``learn()`` loads first, as :meth:`load_dataset` takes it
    :param dataset_kwargs: further arguments of :meth:`load_dataset` for it
    :param pretrain_steps: gradient steps on the dataset that ``learn()`` takes first, once; 0 for algorithms that learn
        offline only, whose ``learn()`` takes no others
    :param offline_fraction: share of every online batch drawn from the offline data: a number, or a schedule of the
        progress remaining (from 1 to 0); None draws from both in proportion to their sizes
    :param keep_offline: keep the offline data in a buffer of its own; False for one buffer with SB3's overwriting
    :param normalize_observations: standardise observations inside the policy, with statistics of the offline data
        (without offline data there is none; use ``VecNormalize``)
    :param compile: compile the losses, and the choice among candidates, with ``torch.compile``; the first gradient steps take
        tens of seconds longer, the first prediction that draws candidates some seconds
    :param precision: "float32", or "bf16" for large matrix products in bfloat16 while training (weights, optimizer, losses,
        targets and acting stay in float32)
    :param on_divergence: what to do when a loss or its gradient is not finite: "stop" (raise :class:`DivergenceError`) or
        "continue" (warn); the step is left out either way
    """

    buffer_size: int
    learning_starts: int
    batch_size: int
    tau: float
    gamma: float
    train_freq: int | tuple[int, str]
    gradient_steps: int
    action_noise: ActionNoise | None
    replay_buffer_class: type[ReplayBuffer] | None
    replay_buffer_kwargs: dict[str, Any] | None
    optimize_memory_usage: bool
    n_steps: int
    target_update_interval: int
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: th.device | str
    actor_learning_rate: float | Schedule | None
    cosine_lr_decay: bool | None
    max_grad_norm: float | None
    curriculum_steps: int | None
    dataset: Any
    dataset_kwargs: dict[str, Any] | None
    pretrain_steps: int
    offline_fraction: float | Schedule | None
    keep_offline: bool
    normalize_observations: bool
    compile: bool
    precision: str
    on_divergence: str
    _init_setup_model: bool


class ActorCriticArguments(SharedArguments, total=False):
    """What the actor-critics share; :class:`~sb3_consistency.algorithms.actor_critic.GenerativeActorCritic` documents it."""

    n_candidates: int
    n_eval_candidates: int
    candidate_selection: str
    candidate_temperature: float
    train_sampling_steps: int | None
    max_q_backup: bool
    q_norm: bool
    actor_q: str
    normalize_actor_q: bool
    target_policy: str
    actor_ema_decay: float
    actor_ema_interval: int
    actor_ema_start: int


class ConsistencyArguments(TypedDict, total=False):
    """What consistency actors share; :class:`~sb3_consistency.algorithms.consistency.ConsistencyPolicyMixin` documents it."""

    metric: str | None
    loss_scaling: bool
    curriculum: tuple[int, int] | None
    consistency_ema_decay: float


class ConsistencyBCArguments(ConsistencyArguments, SharedArguments, total=False):
    """The further arguments of ConsistencyBC."""


class ConsistencyActorCriticArguments(ConsistencyArguments, ActorCriticArguments, total=False):
    """The further arguments of ConsistencyAC and CPQL."""


def at_step(schedule: StepSchedule, step: int) -> float:
    """
    :param schedule: constant or function of the gradient step
    :param step: number of gradient steps taken so far
    :return: the value now
    """
    return float(schedule(step)) if callable(schedule) else float(schedule)


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    integer: bool = False,
    optional: bool = False,
    schedule: bool = False,
) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param low: lowest value allowed
    :param high: highest value allowed; infinity itself never is
    :param open_low: whether ``low`` itself is not allowed
    :param integer: whether it must be an integer
    :param optional: whether None (not set) is allowed
    :param schedule: whether a function is allowed, whose values are not checked
    :raises ValueError: if the value is outside, or NaN
    :raises TypeError: if it is no number
    """
    if (optional and value is None) or (schedule and callable(value)):
        return
    kind: Any = Integral if integer else Real
    if not isinstance(value, kind) or isinstance(value, bool):  # True would pass for 1
        allowed = ["an integer" if integer else "a number", *["None"] * optional, *["a function"] * schedule]
        raise TypeError(f"{name} must be {' or '.join(allowed)}, got {value!r}.")
    if not (low < value <= high if open_low else low <= value <= high) or value == float("inf"):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}.")


def check_flags(*, optional: bool = False, **flags: Any) -> None:
    """
    :param optional: whether None (not set) is allowed
    :param flags: arguments that are True or False, by name
    :raises TypeError: if one is neither
    """
    for name, value in flags.items():
        if optional and value is None:
            continue
        if not (isinstance(value, (bool, int, np.bool_)) and value in (0, 1)):
            raise TypeError(f"{name} must be {'True, False or None' if optional else 'True or False'}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param choices: the values allowed
    :raises ValueError: if it is none of them
    """
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}.")


def check_type(name: str, value: Any, kind: type[Any], wanted: str) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value; None is allowed
    :param kind: what it must be
    :param wanted: the same in words
    :raises TypeError: if it is something else
    """
    if not (value is None or isinstance(value, kind)):
        raise TypeError(f"{name} must be {wanted} or None, got {value!r}.")


def check_class(name: str, value: Any, base: type[Any], or_function: bool = True) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param base: what it must be a subclass of
    :param or_function: whether a function that makes an instance will do
    :raises TypeError: if it is something else, an instance for example
    """
    is_function = or_function and callable(value) and not isinstance(value, base)
    makes = issubclass(value, base) if isinstance(value, type) else is_function
    if not makes:
        wanted = f"{base.__module__}.{base.__qualname__}"
        raise TypeError(f"{name} must be a subclass of {wanted} (the class, not its name or an instance), got {value!r}.")


def check_train_freq(value: Any) -> None:
    """
    :param value: ``train_freq``
    :raises ValueError: if it is neither a positive number of steps nor such a number and a unit
    """
    number, unit = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, "step")
    if not isinstance(number, Integral) or isinstance(number, bool) or unit not in ("step", "episode", *TrainFrequencyUnit):
        raise ValueError(f"train_freq must be a number of steps, or (n, 'step') or (n, 'episode'), got {value!r}.")
    check_range("train_freq", number, 1)


def check_pair(name: str, value: Any, low: float, *, integer: bool = False) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param low: lowest value allowed
    :param integer: whether both must be integers
    :raises ValueError: if they are not two, or one is outside
    :raises TypeError: if one is no number
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}.")
    for number in value:
        check_range(name, number, low, integer=integer)


def check_shared(arguments: Mapping[str, Any]) -> None:
    """
    :param arguments: the arguments that all algorithms share, by name
    :raises ValueError: if one is out of its range, or two don't go together
    :raises TypeError: if one is of the wrong type
    """
    for name, low in _LOWEST.items():
        check_range(name, arguments[name], low, integer=True)
    flags = ("optimize_memory_usage", "keep_offline", "normalize_observations", "compile")
    check_flags(**{name: arguments[name] for name in flags})
    check_flags(optional=True, cosine_lr_decay=arguments["cosine_lr_decay"])
    check_choice("precision", arguments["precision"], PRECISIONS)
    check_choice("on_divergence", arguments["on_divergence"], ON_DIVERGENCE)
    for name in ("tau", "gamma"):
        check_range(name, arguments[name], 0, 1)
    check_range("learning_starts", arguments["learning_starts"], 0)
    check_range("learning_rate", arguments["learning_rate"], 0, schedule=True)
    check_range("actor_learning_rate", arguments["actor_learning_rate"], 0, optional=True, schedule=True)
    check_range("max_grad_norm", arguments["max_grad_norm"], 0, open_low=True, optional=True)
    check_range("curriculum_steps", arguments["curriculum_steps"], 1, integer=True, optional=True)
    check_range("offline_fraction", arguments["offline_fraction"], 0, 1, optional=True, schedule=True)
    check_train_freq(arguments["train_freq"])
    for name in ("policy_kwargs", "replay_buffer_kwargs", "dataset_kwargs"):
        check_type(name, arguments[name], dict, "a dict")
    check_type("action_noise", arguments["action_noise"], ActionNoise, "an ActionNoise (like NormalActionNoise(mean, sigma))")
    if arguments["replay_buffer_class"] is not None:
        check_class("replay_buffer_class", arguments["replay_buffer_class"], ReplayBuffer, or_function=False)
    if arguments["n_steps"] > 1 and arguments["optimize_memory_usage"]:
        raise ValueError("optimize_memory_usage can't be combined with n_steps > 1: SB3's NStepReplayBuffer has no such mode.")


_LOWEST = {
    "buffer_size": 1,
    "batch_size": 1,
    "gradient_steps": -1,
    "n_steps": 1,
    "target_update_interval": 1,
    "stats_window_size": 1,
    "pretrain_steps": 0,
}

ON_DIVERGENCE = ("stop", "continue")
