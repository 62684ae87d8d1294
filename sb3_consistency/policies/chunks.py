"""Plans and their memory: how a chunk of actions, chosen at once, becomes one action at a time."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_consistency.data.checks import map_observations
from sb3_consistency.envs.spaces import check_n_envs, check_observation
from sb3_consistency.generative.model import HorizonOptions
from sb3_consistency.options import check_range, option
from sb3_consistency.policies.modules import HistoryOptions, count_rows

#: age of a plan that was never made
NO_PLAN = 2**31


class PlanMemory(NamedTuple):
    """
    What a policy remembers between two steps: the ``state`` of SB3's recurrent policies. N environments.

    ``history`` holds the last observations, (N, h, ...) or a dict, on the policy's device; ``plan`` the scaled plan,
    (N, H, D); ``age`` the environment steps since it was made, (N,).
    """

    history: PyTorchObs
    plan: np.ndarray
    age: np.ndarray

    def to(self, device: th.device | str) -> "PlanMemory":
        """
        :param device: a device
        :return: the memory with its tensors there
        """
        return self._replace(history=map_observations(lambda x: x.to(device), self.history))


class ChunkOptions(HorizonOptions, HistoryOptions):
    """Chunks of actions and histories of observations: how many are chosen and seen at once, and how they are acted on."""

    executed_steps: int | None = option(
        default=None,
        low=1,
        before=None,
        doc="environment steps until the next chunk is chosen; None for the whole chunk (in RACTD for 1, of plans of states "
        "for the plan's own, (H - 1) ``stride``). More than that hold the end of a plan of states at rest; more than an "
        "episode has are the paper's open loop",
    )
    pad: bool = option(
        default=True,
        fixed=True,
        before=True,
        doc="whether chunks to learn from may run past the end of an episode, repeating its last action (or state, at rest); "
        "without, they are full",
    )

    def check_together(self) -> None:
        super().check_together()
        check_range("executed_steps", self.executed_steps, 1, self.most_executed, integer=True, optional=True)

    @property
    def most_executed(self) -> float:
        """Most steps that one plan lasts for."""
        return self.horizon

    @property
    def steps_per_plan(self) -> int:
        """Steps between two plans."""
        return self.executed_steps or self.horizon

    @property
    def has_windows(self) -> bool:
        """Whether it learns from windows of several steps, not from single ones."""
        # an equality is of any values, also of those that are refused later, by name
        return (self.horizon, self.history) != (1, 1)


class ChunkPolicy(ChunkOptions, BasePolicy):
    """
    A policy that makes plans, and acts on them. Subclasses supply :meth:`make_plans` and :attr:`plan_shape`.
    """

    @property
    def plan_shape(self) -> tuple[int, int]:
        """Shape (H, D) of a plan."""
        raise NotImplementedError

    def make_plans(self, history: PyTorchObs, deterministic: bool) -> th.Tensor:
        """
        :param history: the last observations, (B, h, ...), or a dict of them
        :param deterministic: from the fixed noise
        :return: scaled plans, (B, H, D)
        """
        raise NotImplementedError

    @property
    def remembers(self) -> bool:
        """Whether an action depends on more than the present observation."""
        return self.history > 1 or self.steps_per_plan > 1

    def repeat(self, obs: PyTorchObs) -> PyTorchObs:
        """
        :param obs: observations, (B, ...), or a dict of them
        :return: the history at the first step of an episode: its observation, repeated, (B, h, ...)
        """
        return map_observations(lambda x: x.unsqueeze(1).expand(-1, self.history, *x.shape[1:]), obs)

    def unscale_plans(self, plans: th.Tensor) -> np.ndarray:
        """
        :param plans: scaled plans, (B, H, D)
        :return: plans in the environment's units, (B, H, *action shape)
        """
        return self.unscale_action(plans.cpu().numpy().reshape(*plans.shape[:2], *self.action_space.shape))  # type: ignore[misc]

    @th.no_grad()
    def plan(self, observation: Any, deterministic: bool = False) -> np.ndarray:
        """
        Choose a chunk of actions, as if the observation were an episode's first.

        :param observation: one observation or a batch of them
        :param deterministic: from the fixed noise
        :return: actions in the environment's units, (H, *action shape), or (B, H, *action shape) for a batch
        """
        self.set_training_mode(False)
        check_observation(observation)
        obs, vectorized = self.obs_to_tensor(observation)
        plans = self.unscale_plans(self.make_plans(self.repeat(obs), deterministic))
        return plans if vectorized else plans[0]

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """
        Choose an action, or go on with the plan in memory. Where an action depends on nothing but the present observation,
        there is no memory.

        :param observation: one observation or a batch of them
        :param state: what the previous call returned; None makes a new plan, as at an episode's first step
        :param episode_start: which environments are at the first step of an episode, (N,)
        :param deterministic: from the fixed noise
        :return: actions, and the :class:`PlanMemory` to hand back (None if there is none)
        """
        if not self.remembers:
            return super().predict(observation, None, episode_start, deterministic)
        self.set_training_mode(False)
        check_observation(observation)
        obs, vectorized = self.obs_to_tensor(observation)
        actions, memory = self.act(obs, state, episode_start, deterministic)
        return (actions if vectorized else actions[0]), memory

    @th.no_grad()
    def act(
        self, obs: PyTorchObs, memory: PlanMemory | None, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, PlanMemory]:
        """
        :param obs: present observations, (N, ...), or a dict of them
        :param memory: None at first
        :param episode_start: which environments are at the first step of an episode, (N,)
        :param deterministic: from the fixed noise
        :return: actions in the environment's units, (N, *action shape), and the memory
        """
        history, plan, age = memory = self.observe(obs, memory, episode_start)
        rows = np.flatnonzero(age >= self.steps_per_plan)
        if len(rows):
            plan[rows] = self.make_plans(map_observations(lambda x: x[rows], history), deterministic).cpu().numpy()
            age[rows] = 0
        return self.next_actions(memory), memory

    def observe(self, obs: PyTorchObs, memory: PlanMemory | None, episode_start: np.ndarray | None) -> PlanMemory:
        """
        Take the present observations into the memory, without a plan where a new episode starts.

        :param obs: present observations, (N, ...), or a dict of them
        :param memory: None at first
        :param episode_start: which environments are at the first step of an episode, (N,); None for none
        :return: the memory, one step older
        :raises ValueError: if they are of different numbers of environments
        """
        first = self.repeat(obs)
        n = count_rows(first)
        if memory is None:
            # an image may still be the environment's own array
            history = map_observations(lambda x: x.clone(), first)
            return PlanMemory(history, np.zeros((n, *self.plan_shape), np.float32), np.full(n, NO_PLAN))
        if not isinstance(memory, PlanMemory):
            raise TypeError(f"state must be what the last predict() returned, or None, got a {type(memory).__name__}.")
        check_n_envs(n, state=len(memory.age), episode_start=n if episode_start is None else np.size(episode_start))
        fresh = np.zeros(n, bool) if episode_start is None else np.asarray(episode_start, bool).reshape(n)
        history = first
        if self.history > 1:
            history = map_observations(lambda past, now: th.cat([past[:, 1:], now[:, -1:]], dim=1), memory.history, first)
            rows = np.flatnonzero(fresh)
            if len(rows):
                map_observations(lambda past, now: past.__setitem__(rows, now[rows]), history, first)
        return PlanMemory(history, memory.plan.copy(), np.where(fresh, NO_PLAN, memory.age + 1))

    def next_actions(self, memory: PlanMemory) -> np.ndarray:
        """
        :param memory: of N environments
        :return: actions in the environment's units, (N, *action shape)
        """
        chosen = memory.plan[np.arange(len(memory.age)), memory.age]
        return self.unscale_action(chosen.reshape(-1, *self.action_space.shape))  # type: ignore[misc]
