"""Mini-batches from SB3's replay buffers, many at once, offline and online data mixed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.buffer import Segment

# batches sampled from the replay buffer at once
CHUNK = 64
# at most this much memory goes into them
CHUNK_BYTES = 2**26


class Batch(NamedTuple):
    """
    Transitions: observations (B, ...), scaled actions (B, A), and (B, 1) of the rest.

    ``dones`` is 1 for terminations only; ``discounts`` is gamma^n where n steps are summed in ``rewards``.
    """

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    rewards: th.Tensor
    dones: th.Tensor
    discounts: th.Tensor


def tree_map(function: Any, *trees: Any) -> Any:
    """
    :param function: function of one tensor of every tree
    :param trees: tensors, or dicts or tuples of them, of one structure
    :return: the results in the same structure
    """
    first = trees[0]
    if isinstance(first, dict):
        return {key: tree_map(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple):
        return tuple(tree_map(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)


def can_sample(buffer: ReplayBuffer | None) -> bool:
    """
    :param buffer: a replay buffer, or None
    :return: whether it has anything to sample (HER needs a finished episode)
    """
    if buffer is None or buffer.size() == 0:
        return False
    return bool((buffer.ep_length > 0).any()) if isinstance(buffer, HerReplayBuffer) else True


def samples_as_sb3(buffer: ReplayBuffer) -> bool:
    """
    :param buffer: a replay buffer
    :return: whether its ``sample`` is one of SB3's, in which rows are independent of each other
    """
    return type(buffer).sample.__module__.startswith("stable_baselines3.")


def bytes_per_transition(space: spaces.Space) -> int:
    """
    :param space: observation space
    :return: bytes of the two observations of a transition, the bulk of it where they are images
    """
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    return 2 * sum(math.prod(part.shape or (1,)) * (part.dtype.itemsize if part.dtype else 4) for part in parts)


def sample(
    buffer: ReplayBuffer, size: int, gamma: float, env: VecNormalize | None, segments: list[Segment] | None = None
) -> Batch:
    """
    :param buffer: SB3 replay buffer
    :param size: number of transitions
    :param gamma: discount factor of buffers that do not sum several steps
    :param env: VecNormalize whose statistics normalise the samples
    :param segments: draw from these row ranges in their shares, instead of uniformly
    :return: transitions
    """
    if segments:
        chosen = np.random.choice(len(segments), size=size, p=[segment.share for segment in segments])
        starts, stops = np.array([(s.start, s.stop) for s in segments])[chosen].T
        data: Any = buffer._get_samples(np.random.randint(starts, stops), env=env)
    elif isinstance(buffer, HerReplayBuffer):
        data = _sample_goals(buffer, size, env)
    else:
        data = buffer.sample(size, env=env)
    discounts = th.full_like(data.rewards, gamma) if data.discounts is None else data.discounts
    observations, next_observations = data.observations, data.next_observations
    return Batch(observations, data.actions.float(), next_observations, data.rewards, data.dones, discounts)


def _sample_goals(buffer: HerReplayBuffer, size: int, env: VecNormalize | None) -> Any:
    # SB3 would ask the environment for the rewards of no rows: draw more, keep some
    drawn = max(size, math.ceil(1 / buffer.her_ratio)) if buffer.her_ratio > 0 else size
    data = _checked(lambda: buffer.sample(drawn, env=env), drawn, lambda data: len(data.rewards))
    # real rows come first, those with other goals after them: mixed, every batch that is cut out of them has its share
    chosen = th.randperm(drawn, device=data.rewards.device)[:size]
    return type(data)(*(None if x is None else tree_map(lambda y: y[chosen], x) for x in data))


def rewards_of_goals(buffer: HerReplayBuffer, achieved: np.ndarray, desired: np.ndarray, infos: list[Any]) -> np.ndarray:
    """
    Ask the environment of a buffer for the rewards of other goals than those that were pursued.

    :param buffer: the buffer
    :param achieved: goals achieved, (n, ...)
    :param desired: goals in hindsight, (n, ...)
    :param infos: infos of the n steps
    :return: rewards, (n,)
    :raises ValueError: if its ``compute_reward`` can't take several
    """
    env = buffer.env
    assert env is not None
    compute = lambda: env.env_method("compute_reward", achieved, desired, infos, indices=[0])[0]  # noqa: E731
    rewards: np.ndarray = np.asarray(_checked(compute, len(achieved), np.size), np.float32)
    return rewards


def _checked(compute: Callable[[], Any], n_rows: int, count: Callable[[Any], int]) -> Any:
    """What is computed with the rewards of several goals, or an error that says how to compute those."""
    remedy = (
        "HerReplayBuffer calls compute_reward(achieved_goals, desired_goals, infos) with arrays of n rows and n infos, and it "
        "must return n rewards (np.linalg.norm(..., axis=-1); no 'if' on a whole array)."
    )
    try:
        computed = compute()
    except Exception as error:  # whatever it raises where it can't take several
        raise ValueError(f"env: the rewards of goals in hindsight can't be computed ({error!r}). {remedy}") from error
    if count(computed) != n_rows:
        raise ValueError(f"env: compute_reward returned {count(computed)} rewards in all for {n_rows} rows. {remedy}")
    return computed


def split(batch: Any, n_batches: int) -> list[Any]:
    """
    :param batch: ``n_batches * B`` transitions (or other rows), in a NamedTuple
    :param n_batches: number of parts
    :return: the parts, as views, of the same type
    """
    chunks = tree_map(lambda x: x.reshape(n_batches, -1, *x.shape[1:]), tuple(batch))
    return [type(batch)(*tree_map(lambda x, i=i: x[i], chunks)) for i in range(n_batches)]


def concatenate(first: list[Batch], second: list[Batch]) -> list[Batch]:
    """
    :param first: batches
    :param second: as many batches
    :return: pairwise joined batches
    """
    return [Batch(*tree_map(lambda x, y: th.cat([x, y]), tuple(a), tuple(b))) for a, b in zip(first, second, strict=True)]
