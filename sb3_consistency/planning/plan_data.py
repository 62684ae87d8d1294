"""A planner's offline data: batches of windows, and its own scaling of observations and returns."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_consistency.data.buffer import BlockWriter, block_rows, converted_episodes, set_size
from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.converter import EpisodeConverter
from sb3_consistency.data.statistics import ObservationStatistics
from sb3_consistency.envs.spaces import is_normalised_space
from sb3_consistency.planning.windows import WindowRows, Windows
from sb3_consistency.training.batches import split, tree_map
from sb3_consistency.training.offline_data import HELDOUT_ROWS, OfflineData


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


class PlanData(OfflineData):
    """A planner's offline data: its batches are windows of trajectories."""

    _windows: Windows | None = None

    def windows(self) -> Windows:
        """
        :return: the windows of the offline data
        :raises DatasetError: if no episode is long enough and ``pad`` is off
        """
        buffer = self.buffer
        assert buffer is not None
        if self._windows is None or self._windows.buffer is not buffer:
            self._windows = self._windows_of(buffer)
        return self._windows

    def _windows_of(self, buffer: ReplayBuffer) -> Windows:
        m = self.model
        goal_key = "desired_goal" if m.plan_of == "states" and m.cut_at_goals else None
        return Windows(buffer, m.horizon, m.history, m.pad, m.gamma, goal_key, m.stride)

    def read_heldout(self, converters: list[EpisodeConverter], held: list[np.ndarray]) -> dict[str, Any] | None:
        """Held-out episodes keep their order, in a buffer of their own: windows are taken from it."""
        episodes = [e for converter, h in zip(converters, held, strict=True) for e in converted_episodes(converter, h)]
        if not episodes:
            return None
        size = sum(len(e) for e in episodes)
        if size < self.model.n_envs:
            raise DatasetError(
                f"heldout_fraction: the held-out episodes have {size} transition(s), fewer than there are environments "
                f"({self.model.n_envs}), each of which gets windows: hold out more, or use fewer environments."
            )
        rows = block_rows(size, self.model.n_envs)
        buffer = self.model.new_buffer((rows + int(self.model.optimize_memory_usage)) * self.model.n_envs)
        writer = BlockWriter(buffer, 0, size)
        for episode in episodes:
            writer.write(episode)
        set_size(buffer, rows)
        return {"windows": self._windows_of(buffer)}

    @th.no_grad()
    def heldout_loss(self) -> float:
        """
        :return: denoising loss of the teacher, or of the student in its stage, with the same noise at every call
        """
        model = self.model
        model.policy.set_training_mode(False)
        assert self.heldout is not None
        windows = self.heldout["windows"]
        chosen = np.linspace(0, len(windows) - 1, min(HELDOUT_ROWS, len(windows))).astype(int)
        batch = self._plan_batch(windows, windows.at(windows.starts[chosen]))
        network = model.policy.student if model.stage == "student" else model.policy.teacher_model
        generator = th.Generator().manual_seed(0)
        noise = th.randn(batch.plans.shape, generator=generator).to(model.device)
        u = th.rand(len(chosen), 2, generator=generator).to(model.device)
        loss = network.model.denoising_loss(batch.plans, network.condition(batch.conditions), noise=noise, u=u)[0]
        return float(loss.mean())

    def sample(self, n_batches: int, batch_size: int) -> list[Any]:
        windows = self.windows()
        return split(self._plan_batch(windows, windows.sample(n_batches * batch_size, self.segments)), n_batches)

    def _plan_batch(self, windows: Windows, at: WindowRows) -> PlanBatch:
        buffer, normalise = windows.buffer, windows.buffer._normalize_obs
        observed = normalise(windows.take(buffer.observations, at.past, at.columns), self.model._vec_normalize_env)
        history = tree_map(buffer.to_torch, observed)
        conditions = reward_conditions = self.model.policy.conditions(history)
        if self.model.plan_of == "actions":
            plans = buffer.to_torch(windows.take(buffer.actions, at.rows, at.columns))
        else:
            states = windows.take(buffer.observations["observation"], at.rows, at.columns)
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
        self._windows = self._windows_of(buffer)
        super().install(buffer)
        # other data, or another gamma, may come while R has not learned yet
        if self.model._n_updates <= self.model.stage_ends()[0]:
            returns = self._windows.returns[: buffer.size()]
            self.model.policy.reward_model.fit_returns(float(returns.min()), float(returns.max()))

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
