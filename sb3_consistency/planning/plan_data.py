"""A planner's offline data: batches of windows, and its own scaling of observations and returns."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_consistency.data.statistics import ObservationStatistics
from sb3_consistency.envs.spaces import is_normalised_space
from sb3_consistency.policies.modules import in_parts
from sb3_consistency.training.batches import split, tree_map
from sb3_consistency.training.offline_data import HELDOUT_PART, OfflineData, spread_windows
from sb3_consistency.training.windows import WindowRows, Windows, augmented, discounted_returns


class PlanBatch(NamedTuple):
    """
    Windows: what plans are conditioned on, and the reward model, (B, n, ...); scaled plans (B, H, D), returns (B,).

    The two conditions differ for plans of states: there the planner is given the state that the window ends in, the
    reward model the goal of the environment.
    """

    conditions: PyTorchObs
    reward_conditions: PyTorchObs
    plans: th.Tensor
    returns: th.Tensor


class PlanWindows(Windows):
    """
    Windows of data that no longer grows, with the discounted return from every step to the end of its trajectory.

    :param gamma: discount factor of the returns
    :param kwargs: as for :class:`Windows`
    """

    def __init__(self, *args: Any, gamma: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma = gamma

    @cached_property
    def returns(self) -> np.ndarray:
        """Return from every step, (buffer_size, n_envs)."""
        order, ends = self.in_order()
        returns = np.zeros((self.buffer.buffer_size, self.buffer.n_envs), np.float32)
        returns[order] = discounted_returns(self.buffer.rewards[order], ends, self.gamma)
        return returns


class PlanData(OfflineData):
    """A planner's offline data: its batches are windows of trajectories."""

    _windows: PlanWindows | None = None

    def windows_of(self, buffer: ReplayBuffer) -> PlanWindows:
        m = self.model
        goal_key = "desired_goal" if m.plan_of == "states" and m.cut_at_goals else None
        return PlanWindows(buffer, m.horizon, m.history, m.pad, goal_key, m.stride, gamma=m.gamma)

    def windows(self) -> PlanWindows:
        """
        :return: the windows of the offline data
        """
        buffer = self.buffer
        assert buffer is not None
        windows, model = self._windows, self.model
        if windows is None or windows.buffer is not buffer or windows.gamma != model.gamma:
            self._windows = windows = self.windows_of(buffer)
            # other data, or another gamma, may come while R has not learned yet
            if model._n_updates <= model.stage_ends()[0]:
                returns = windows.returns[: buffer.size()]
                model.policy.reward_model.fit_returns(float(returns.min()), float(returns.max()))
        return windows

    @th.no_grad()
    def heldout_loss(self) -> float:
        """
        :return: denoising loss of the teacher, or of the student in its stage, with the same noise at every call
        """
        model = self.model
        model.policy.set_training_mode(False)
        assert self.heldout is not None
        windows = self.heldout["windows"]
        batch = self._plan_batch(windows, spread_windows(windows), augment=False)
        network = model.policy.student if model.stage == "student" else model.policy.teacher_model
        generator = th.Generator().manual_seed(0)
        noise = th.randn(batch.plans.shape, generator=generator).to(model.device)
        u = th.rand(len(batch.plans), 2, generator=generator).to(model.device)

        def loss(rows: Any) -> th.Tensor:
            condition = network.condition(rows["conditions"])
            losses: th.Tensor = network.model.denoising_loss(rows["plans"], condition, noise=rows["noise"], u=rows["u"])[0]
            return losses

        whole: Any = {"plans": batch.plans, "conditions": batch.conditions, "noise": noise, "u": u}
        return float(in_parts(loss, whole, HELDOUT_PART).mean())

    def sample(self, n_batches: int, batch_size: int) -> list[Any]:
        windows = self.windows()
        return split(self._plan_batch(windows, windows.sample(n_batches * batch_size, self.segments)), n_batches)

    def _plan_batch(self, windows: PlanWindows, at: WindowRows, augment: bool = True) -> PlanBatch:
        buffer, observed = windows.buffer, windows.observations(at.past, at.columns)
        if augment:
            observed = augmented(buffer, observed)
        history = tree_map(buffer.to_torch, buffer._normalize_obs(observed, self.model._vec_normalize_env))
        conditions = reward_conditions = self.model.policy.conditions(history)
        if self.model.plan_of == "actions":
            plans = buffer.to_torch(windows.take(buffer.actions, at.rows, at.columns))
        else:
            states = windows.observations(at.rows, at.columns)["observation"]
            # waiting at the end of an episode is being at rest there
            states[..., states.shape[-1] // 2 :][at.padded] = 0
            plans = buffer.to_torch(states)
            conditions = plans[:, [0, -1]]
        returns = self.model.policy.reward_model.scale(buffer.to_torch(windows.returns[at.rows[:, 0], at.columns[:, 0]]))
        return PlanBatch(conditions, reward_conditions, self.model.policy.scale_plans(plans), returns)

    def install(self, buffer: ReplayBuffer) -> None:
        vec_normalize = self.model._vec_normalize_env
        if self.model.plan_of == "states" and vec_normalize is not None and vec_normalize.norm_obs:
            raise ValueError("env: plan_of='states' plans in the environment's units: use VecNormalize(norm_obs=False).")
        super().install(buffer)
        self.windows()

    def fit_normalizer(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        """Centre and half range in the place of mean and deviation: min-max scaling to [-1, 1]."""
        if self.model.teacher is not None:
            return  # its observations stay scaled as they were
        observations: Any = buffer.observations
        if self.model.plan_of == "states":
            observations = observations["observation"]
        entries = observations if isinstance(observations, dict) else {"": observations}
        space = self.model.policy.network_space
        kept = {k: x[:n_rows] for k, x in entries.items() if is_normalised_space(space[k] if k else space)}
        low = {k: x.min(axis=(0, 1)) for k, x in kept.items()}
        high = {k: x.max(axis=(0, 1)) for k, x in kept.items()}
        self.model.policy.fit_normalizer({k: (high[k] + low[k]) / 2 for k in kept}, {k: (high[k] - low[k]) / 2 for k in kept})
