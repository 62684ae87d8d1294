"""The constructor arguments that all algorithms share, declared and documented once."""

from collections.abc import Callable
from typing import Any, TypedDict

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule

# a constant, or a function of the number of gradient steps taken so far
StepSchedule = float | Callable[[int], float]


class SharedArguments(TypedDict, total=False):
    """
    SB3's arguments keep SAC's names and defaults; see :class:`stable_baselines3.SAC` for those not listed.

    :param actor_learning_rate: learning rate (or schedule) of the actor; None for ``learning_rate``
    :param cosine_lr_decay: multiply the learning rates by a cosine that falls to 0 over the run
    :param max_grad_norm: clip the gradient of every network to this norm
    :param curriculum_steps: gradient steps over which curricula (the number of noise levels) run; None for the length
        of the first offline phase; online without one, they stand at their end
    :param dataset: data that ``learn()`` loads first, as :meth:`load_dataset` takes it
    :param dataset_kwargs: further arguments of :meth:`load_dataset` for it
    :param pretrain_steps: gradient steps on the dataset that ``learn()`` takes first, once
    :param offline_fraction: share of every online batch drawn from the offline data: a number, or a schedule of the
        progress remaining (from 1 to 0); None draws from both in proportion to their sizes
    :param keep_offline: keep the offline data in a buffer of its own; False for one buffer with SB3's overwriting
    :param normalize_observations: standardise observations inside the policy, with statistics of the offline data
        (without offline data there is none; use ``VecNormalize``)
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
    cosine_lr_decay: bool
    max_grad_norm: float | None
    curriculum_steps: int | None
    dataset: Any
    dataset_kwargs: dict[str, Any] | None
    pretrain_steps: int
    offline_fraction: float | Schedule | None
    keep_offline: bool
    normalize_observations: bool
    _init_setup_model: bool


def at_step(schedule: StepSchedule, step: int) -> float:
    """
    :param schedule: constant or function of the gradient step
    :param step: number of gradient steps taken so far
    :return: the value now
    """
    return float(schedule(step)) if callable(schedule) else float(schedule)


def check_range(name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param low: lowest value allowed
    :param high: highest value allowed
    :param open_low: whether ``low`` itself is not allowed
    :raises ValueError: if the value is outside
    """
    if not (low < value <= high if open_low else low <= value <= high):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}.")
