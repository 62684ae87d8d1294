"""The planner's policy: teacher, its moving average, reward model and student; and how a plan becomes actions."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_consistency.envs.spaces import check_n_envs, check_observation
from sb3_consistency.generative.edm import EDMModel
from sb3_consistency.generative.networks import Mish
from sb3_consistency.generative.trajectory import TrajectoryConsistencyModel
from sb3_consistency.options import check_range
from sb3_consistency.planning.plan_networks import TRAINING_LEVELS, PlanNetwork, RewardModel
from sb3_consistency.planning.tracking import forces, planned_states
from sb3_consistency.policies.modules import FeatureNetwork
from sb3_consistency.policies.policy import NetworksPolicy
from sb3_consistency.training.batches import tree_map

PLANS = tuple(TRAINING_LEVELS)
WEIGHT_DECAY = {"teacher_model": 1e-6, "reward_model": 1e-3, "student": 1e-4}


class PlanMemory(NamedTuple):
    """
    What a planner remembers between two steps: the ``state`` of SB3's recurrent policies. N environments.

    ``history`` holds the last observations, (N, h, ...) or a dict; ``plan`` the scaled plan, (N, H, D); ``age`` the
    environment steps since it was made, (N,).
    """

    history: PyTorchObs
    plan: th.Tensor
    age: np.ndarray


class PlannerPolicy(NetworksPolicy):
    """
    Policy of a planner: plans a window in one network pass, and acts on it.

    What the algorithm needs (``plan_of`` to ``reward_horizon``) it passes itself; ``policy_kwargs`` holds the rest.

    :param observation_space: observation space
    :param action_space: action space
    :param lr_schedule: learning rate schedule
    :param net_arch: widths of all networks, or ``dict(pi=[...], qf=[...])`` for planners and reward model; None for
        three layers of 256 (network "mlp") or channels 64-128-256 ("unet"), and 256-256 in the reward model
    :param activation_fn: activation class of all networks
    :param network: backbone of teacher and student, "mlp" over the whole window or "unet" over time
    :param dropout: dropout probability in the student
    :param features_extractor_class: features extractor
    :param features_extractor_kwargs: its arguments
    :param normalize_images: whether to divide images by 255
    :param optimizer_class: optimizer of every network; with AdamW each has a weight decay of its own
    :param optimizer_kwargs: its arguments, except the learning rate; None for betas (0.95, 0.999) of AdamW
    :param model_kwargs: arguments of teacher and student, see :class:`KarrasModel` and :data:`TRAINING_LEVELS`
    :param student_kwargs: arguments of the student alone, see :class:`TrajectoryConsistencyModel`
    :param plan_of: "actions" or "states"
    :param horizon: number H of actions or states of a plan
    :param stride: steps of the environment from one planned state to the next
    :param history: number of observations that a plan of actions is conditioned on
    :param executed_steps: environment steps until the next plan is made; None for 1 (actions) or the plan's own, (H - 1)
        ``stride`` (states). More than that hold the end of a plan of states at rest; more than an episode has are the
        paper's open loop
    :param tracking_gains: gains of position and velocity of the controller that tracks a plan of states
    :param sampling_steps: default number of jumps, that is network passes, per plan
    :param reward_horizon: number of a plan's actions that the reward model sees
    :param noise_seed: seed of the fixed noise of deterministic plans
    :param noise_scale: its standard deviation, see :class:`~sb3_consistency.policies.policy.GenerativePolicy`
    :raises ValueError: if an option is unknown, out of its range or does not fit the spaces
    """

    action_space: spaces.Box
    teacher_model: PlanNetwork
    teacher_ema: PlanNetwork
    reward_model: RewardModel
    student: PlanNetwork

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = Mish,
        network: str = "mlp",
        dropout: float = 0.0,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        student_kwargs: dict[str, Any] | None = None,
        plan_of: str = "actions",
        horizon: int = 16,
        stride: int = 1,
        history: int = 1,
        executed_steps: int | None = None,
        tracking_gains: tuple[float, float] = (1.0, 1.0),
        sampling_steps: int = 1,
        reward_horizon: int = 1,
        noise_seed: int = 0,
        noise_scale: float = 0.5,
    ) -> None:
        if optimizer_kwargs is None and optimizer_class is th.optim.AdamW:
            optimizer_kwargs = {"betas": (0.95, 0.999)}
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
        )
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.network = network
        self.dropout = dropout
        self.model_kwargs = dict(model_kwargs or {})
        self.student_kwargs = dict(student_kwargs or {})
        self.plan_of = plan_of
        self.horizon = horizon
        self.stride = stride
        self.history = history
        self.executed_steps = executed_steps
        self.tracking_gains = tracking_gains
        self.sampling_steps = sampling_steps
        self.reward_horizon = reward_horizon
        self.noise_seed = noise_seed
        self.noise_scale = noise_scale
        # the end of a plan of states can be held, that of a plan of actions can't
        most_executed = horizon if plan_of == "actions" else math.inf
        check_range("executed_steps", executed_steps, 1, most_executed, integer=True, optional=True)
        #: steps between two plans; H states are H - 1 moves
        self.steps_per_plan = executed_steps or (1 if plan_of == "actions" else max(1, (horizon - 1) * stride))
        if not 1 <= reward_horizon <= horizon:
            raise ValueError(f"reward_horizon must be in [1, horizon = {horizon}], got {reward_horizon}.")
        if plan_of == "states":
            self._check_goal_space()
        #: the network in training; the others stay in evaluation mode
        self.in_training = "teacher_model"
        #: the network that ``predict`` plans with, and its number of steps (None for the default)
        self.planning_with: tuple[str, int | None] = ("student", None)
        self._build(lr_schedule)

    def _check_goal_space(self) -> None:
        space, n_actions = self.observation_space, get_action_dim(self.action_space)
        entries = space.spaces if isinstance(space, spaces.Dict) else {}
        shapes = {key: getattr(entries.get(key), "shape", None) for key in ("observation", "desired_goal")}
        if shapes != {"observation": (2 * n_actions,), "desired_goal": (n_actions,)}:
            raise ValueError(
                "plan_of='states' tracks positions with forces: it needs Dict observations whose 'observation' is position "
                "and velocity, whose 'desired_goal' is a position, and one action per position; got "
                f"{space} and {n_actions} action(s). Use plan_of='actions'."
            )
        if self.history != 1:
            raise ValueError(f"history must be 1 with plan_of='states', which sees state and goal, got {self.history}.")

    @property
    def network_space(self) -> spaces.Space:
        """Space of what the networks observe: of a Dict with states and goals, the states."""
        space = self.observation_space
        return space["observation"] if self.plan_of == "states" else space  # type: ignore[index]

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        if self.plan_of == "states":
            return FlattenExtractor(self.network_space)
        return super().make_features_extractor()

    def _build(self, lr_schedule: Schedule) -> None:
        widths = {"mlp": [256, 256, 256]}.get(self.network, [64, 128, 256])
        arch, reward_arch = get_actor_critic_arch({"pi": widths, "qf": [256, 256]} if self.net_arch is None else self.net_arch)
        n_actions, n_stacked = get_action_dim(self.action_space), self.history
        width = n_actions
        if self.plan_of == "states":
            width, n_stacked = get_action_dim(self.network_space), 2
        network_kwargs = {"net_arch": arch, "activation_fn": self.activation_fn, **self.model_kwargs.get("network_kwargs", {})}
        shared = {"network": self.network, "network_kwargs": network_kwargs}
        model_kwargs = {**TRAINING_LEVELS[self.plan_of], **self.model_kwargs, **shared}
        student_kwargs = {**model_kwargs, "sampling_steps": self.sampling_steps, **self.student_kwargs}
        own_network_kwargs = self.student_kwargs.get("network_kwargs", {})
        student_kwargs["network_kwargs"] = {"dropout": self.dropout, **network_kwargs, **own_network_kwargs}
        common = {"observation_space": self.network_space, "n_stacked": n_stacked}
        planner = {
            **common,
            "event_shape": (self.horizon, width),
            "noise_seed": self.noise_seed,
            "noise_scale": self.noise_scale,
        }
        for name in ("teacher_model", "teacher_ema"):
            setattr(self, name, self._make(PlanNetwork, None, model_class=EDMModel, model_kwargs=model_kwargs, **planner))
        self.student = self._make(
            PlanNetwork, None, model_class=TrajectoryConsistencyModel, model_kwargs=student_kwargs, **planner
        )
        self.reward_model = self._make(
            RewardModel,
            None,
            net_arch=reward_arch,
            activation_fn=self.activation_fn,
            n_actions=self.reward_horizon if self.plan_of == "actions" else 0,
            **common,
        )
        self.teacher_ema.load_state_dict(self.teacher_model.state_dict())
        self.teacher_ema.requires_grad_(False)
        self.teacher_ema.set_training_mode(False)
        for name in self.trained_networks():
            decay = {"weight_decay": WEIGHT_DECAY[name]} if self.optimizer_class is th.optim.AdamW else {}
            self._add_optimizer(getattr(self, name), lr_schedule, **decay)
        self.set_training_mode(False)

    def network_names(self) -> list[str]:
        return [*self.trained_networks(), "teacher_ema"]

    def trained_networks(self) -> list[str]:
        return ["teacher_model", "reward_model", "student"]

    def target_pairs(self) -> Iterator[tuple[FeatureNetwork, FeatureNetwork]]:
        yield self.teacher_model, self.teacher_ema

    @property
    def actor(self) -> PlanNetwork:
        """The network that acts."""
        return self.student

    def trains(self, name: str) -> bool:
        return name == self.in_training

    def share_normalizer(self) -> None:
        """Give all networks the teacher's observation statistics."""
        for name in self.network_names():
            getattr(self, name).obs_normalizer.load_state_dict(self.teacher_model.obs_normalizer.state_dict())

    def warm_start_student(self) -> None:
        """Start the student from the teacher: at first it denoises as the teacher does, whatever level it jumps to."""
        self.student.features_extractor.load_state_dict(self.teacher_model.features_extractor.state_dict())
        self.student.model.warm_start(self.teacher_model.model)

    def conditions(self, history: PyTorchObs) -> PyTorchObs:
        """
        What a plan is conditioned on: the last observations; for a plan of states the state, and the goal at rest.

        :param history: observations, (B, h, ...), or a dict of them
        :return: stacked observations of :attr:`network_space`, (B, n, ...), or a dict of them
        """
        if self.plan_of == "actions":
            return history
        assert isinstance(history, dict)
        state, goal = history["observation"][:, -1], history["desired_goal"][:, -1]
        return th.stack([state, th.cat([goal, th.zeros_like(goal)], dim=1)], dim=1)

    def scale_plans(self, plans: th.Tensor) -> th.Tensor:
        """
        :param plans: plans as the replay buffer holds them (scaled actions, or states), (B, H, D)
        :return: plans scaled to [-1, 1], (B, H, D)
        """
        return plans.float() if self.plan_of == "actions" else self.student.obs_normalizer(plans.float())

    def unscale_plans(self, plans: th.Tensor) -> np.ndarray:
        """
        :param plans: scaled plans, (B, H, D)
        :return: plans in the environment's units, (B, H, *action shape) or (B, H, size of a state)
        """
        if self.plan_of == "states":
            return self.student.obs_normalizer.invert(plans).cpu().numpy()
        actions = plans.cpu().numpy().reshape(*plans.shape[:2], *self.action_space.shape)
        return self.unscale_action(actions)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._plan(self.conditions(self._repeat(observation)), deterministic)[:, 0]

    def _plan(self, conditions: PyTorchObs, deterministic: bool) -> th.Tensor:
        network, steps = self.planning_with
        return getattr(self, network).plan(conditions, deterministic, steps)

    def _repeat(self, obs: PyTorchObs) -> PyTorchObs:
        """The history at the first step of an episode: its observation, repeated."""
        return tree_map(lambda x: x.unsqueeze(1).expand(-1, self.history, *x.shape[1:]), obs)

    @th.no_grad()
    def plan(
        self, observation: Any, deterministic: bool = False, steps: int | None = None, network: str = "student"
    ) -> np.ndarray:
        """
        Plan from an observation, as if it were an episode's first.

        :param observation: one observation or a batch of them
        :param deterministic: follow the ODE from the fixed noise
        :param steps: jumps of the student, or Heun steps of the teacher; None for the default
        :param network: "student", or "teacher_ema"
        :return: the plan in the environment's units, (H, ...), or (B, H, ...) for a batch
        """
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        plans = self.unscale_plans(getattr(self, network).plan(self.conditions(self._repeat(obs)), deterministic, steps))
        return plans if vectorized else plans[0]

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """
        Act on a plan. Only a planner that replans at every step from the present observation has no state.

        :param observation: one observation or a batch of them
        :param state: what the previous call returned; None at first
        :param episode_start: which environments are at the first step of an episode, (N,)
        :param deterministic: follow the ODE from the fixed noise
        :return: actions, and the :class:`PlanMemory` to hand back (None if there is none)
        """
        if self.plan_of == "actions" and self.history == 1 and self.steps_per_plan == 1:
            return super().predict(observation, None, episode_start, deterministic)
        self.set_training_mode(False)
        check_observation(observation)
        obs, vectorized = self.obs_to_tensor(observation)
        with th.no_grad():
            actions, memory = self._act(obs, state, episode_start, deterministic)
        return (actions if vectorized else actions[0]), memory

    def _act(
        self, obs: PyTorchObs, memory: PlanMemory | None, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, PlanMemory]:
        first = self._repeat(obs)
        n = len(next(iter(first.values())) if isinstance(first, dict) else first)
        if memory is None:
            stale, history = np.ones(n, bool), first
            plan, age = self.student.empty_plan(n), np.zeros(n, np.int64)
        else:
            check_n_envs(n, state=len(memory.age), episode_start=n if episode_start is None else np.size(episode_start))
            fresh = np.zeros(n, bool) if episode_start is None else np.asarray(episode_start, bool).reshape(n)
            rows = np.flatnonzero(fresh)
            history = tree_map(lambda past, now: th.cat([past[:, 1:], now[:, -1:]], dim=1), memory.history, first)
            tree_map(lambda past, now: past.__setitem__(rows, now[rows]), history, first)
            plan, age = memory.plan.clone(), memory.age + 1
            stale = fresh | (age >= self.steps_per_plan)
            if self.plan_of == "states":
                old, new = (h["desired_goal"][:, -1] for h in (memory.history, history))  # type: ignore[index]
                stale |= (old != new).any(dim=1).cpu().numpy()
        rows = np.flatnonzero(stale)
        if len(rows):
            plan[rows] = self._plan(self.conditions(tree_map(lambda x: x[rows], history)), deterministic)
            age = np.where(stale, 0, age)
        memory = PlanMemory(history, plan, age)
        return (self._track(memory) if self.plan_of == "states" else self._next_action(memory)), memory

    def _next_action(self, memory: PlanMemory) -> np.ndarray:
        chosen = memory.plan[np.arange(len(memory.age)), memory.age].cpu().numpy()
        return self.unscale_action(chosen.reshape(-1, *self.action_space.shape))

    def _track(self, memory: PlanMemory) -> np.ndarray:
        """Pull towards the state planned for the next step."""
        assert isinstance(memory.history, dict)
        targets = planned_states(self.unscale_plans(memory.plan), memory.age + 1, self.stride)
        pull = forces(memory.history["observation"][:, -1].cpu().numpy(), targets, self.tracking_gains)
        return np.clip(pull, self.action_space.low, self.action_space.high).astype(self.action_space.dtype)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = """
            net_arch activation_fn network dropout features_extractor_class features_extractor_kwargs optimizer_class
            optimizer_kwargs model_kwargs student_kwargs plan_of horizon stride history executed_steps tracking_gains
            sampling_steps reward_horizon noise_seed noise_scale
        """
        # the learning rate is not needed to act
        parameters = {"lr_schedule": self._dummy_schedule, **{name: getattr(self, name) for name in names.split()}}
        return {**super()._get_constructor_parameters(), **parameters}


class PlannerCnnPolicy(PlannerPolicy):
    """:class:`PlannerPolicy` for images: the default features extractor is SB3's ``NatureCNN``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"features_extractor_class": NatureCNN, **kwargs})


class PlannerMultiInputPolicy(PlannerPolicy):
    """:class:`PlannerPolicy` for Dict observations: the default features extractor is SB3's ``CombinedExtractor``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"features_extractor_class": CombinedExtractor, **kwargs})
