"""The planner's policy: teacher, its moving average, reward model and student; and how a plan becomes actions."""

import math
from typing import Any

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
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_consistency.envs.spaces import check_observation
from sb3_consistency.generative.networks import Mish
from sb3_consistency.generative.trajectory import JumpOptions, TrajectoryConsistencyModel
from sb3_consistency.options import option
from sb3_consistency.planning.plan_networks import TRAINING_LEVELS, PlanNetwork, RewardModel
from sb3_consistency.planning.tracking import forces, planned_states
from sb3_consistency.policies.chunks import NO_PLAN, ChunkOptions, ChunkPolicy, PlanMemory
from sb3_consistency.policies.modules import Network, NoiseOptions, check_net_arch
from sb3_consistency.policies.policy import NetworksPolicy

PLANS = tuple(TRAINING_LEVELS)
WEIGHT_DECAY = {"teacher_model": 1e-6, "reward_model": 1e-3, "student": 1e-4}


class PlanOptions(ChunkOptions):
    """What is planned, and how a plan becomes actions."""

    horizon: int = 16

    plan_of: str = option(
        default="actions",
        one_of=PLANS,
        fixed=True,
        doc='"actions": plan the next actions and replan; "states": plan the states to a goal and track them',
    )
    stride: int = option(
        default=1,
        low=1,
        fixed=True,
        doc="steps of the environment from one planned state to the next; plans of actions have all, 1",
    )
    tracking_gains: tuple[float, float] = option(
        default=(1.0, 1.0), low=0, doc="gains of position and velocity of the controller that tracks a plan of states"
    )
    reward_horizon: int = option(
        default=1, low=1, fixed=True, doc="number of a plan's actions that the reward model sees; 1 in the paper"
    )

    def check_together(self) -> None:
        super().check_together()
        if self.reward_horizon > self.horizon:
            raise ValueError(f"reward_horizon must be in [1, horizon = {self.horizon}], got {self.reward_horizon}.")
        if self.history != 1 and self.plan_of == "states":
            raise ValueError(f"history must be 1 with plan_of='states', which sees state and goal, got {self.history}.")

    @property
    def most_executed(self) -> float:
        """The end of a plan of states can be held, that of a plan of actions can't."""
        return self.horizon if self.plan_of == "actions" else math.inf

    @property
    def steps_per_plan(self) -> int:
        """Steps between two plans; H states are H - 1 moves."""
        return self.executed_steps or (1 if self.plan_of == "actions" else max(1, (self.horizon - 1) * self.stride))

    @property
    def has_windows(self) -> bool:
        return True


class PlannerPolicy(PlanOptions, JumpOptions, NoiseOptions, ChunkPolicy, NetworksPolicy):
    """
    Policy of a planner: plans a window in one network pass, and acts on it.

    What the algorithm has options for (``networks``, those of :class:`PlanOptions`, ``sampling_steps``) it passes itself;
    ``policy_kwargs`` holds the rest.

    :raises ValueError: if an option is unknown, out of its range or does not fit the spaces
    """

    teacher_model: PlanNetwork = option(init=False)
    teacher_ema: PlanNetwork = option(init=False)
    reward_model: RewardModel = option(init=False)
    student: PlanNetwork = option(init=False)

    net_arch: list[int] | dict[str, list[int]] | None = option(
        default=None,
        check=check_net_arch,
        fixed=True,
        doc="widths of all networks, or ``dict(pi=[...], qf=[...])`` for planners and reward model; None for three layers of "
        '256 (network "mlp") or channels 64-128-256 ("unet"), and 256-256 in the reward model',
    )
    activation_fn: type[nn.Module] = option(default=Mish, fixed=True, doc="activation class of all networks")
    network: str = option(
        default="mlp", fixed=True, doc='backbone of teacher and student, "mlp" over the whole window or "unet" over time'
    )
    dropout: float = option(default=0.0, fixed=True, doc="dropout probability in the student")
    optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW
    model_kwargs: dict[str, Any] | None = option(
        default=None, fixed=True, doc="arguments of teacher and student, see :class:`KarrasModel` and :data:`TRAINING_LEVELS`"
    )
    student_kwargs: dict[str, Any] | None = option(
        default=None, fixed=True, doc="arguments of the student alone, see :class:`TrajectoryConsistencyModel`"
    )

    def construct(self, values: dict[str, Any]) -> None:
        #: the network in training; the others stay in evaluation mode
        self.in_training = "teacher_model"
        #: the network that ``predict`` plans with, and its number of steps (None for the default)
        self.planning_with: tuple[str, int | None] = ("student", None)
        super().construct(values)
        self.set_training_mode(False)

    @property
    def remembers(self) -> bool:
        return self.plan_of == "states" or super().remembers

    def check_together(self) -> None:
        super().check_together()
        if self.plan_of == "states":
            self._check_goal_space()
            self._check_extractor()

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

    def _check_extractor(self) -> None:
        extractor = self.features_extractor_class
        if self.features_extractor_kwargs or extractor not in (FlattenExtractor, CombinedExtractor):
            raise ValueError(
                "features_extractor_class must be left out with plan_of='states', whose plans are compared with states, "
                f"got {extractor.__name__} and {self.features_extractor_kwargs}."
            )

    @property
    def network_space(self) -> spaces.Space:
        """Space of what the networks observe: of a Dict with states and goals, the states."""
        space = self.observation_space
        return space["observation"] if self.plan_of == "states" else space  # type: ignore[index]

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        if self.plan_of == "states":
            return FlattenExtractor(self.network_space)
        return super().make_features_extractor()

    def network_kwargs(self, network: Network) -> dict[str, Any]:
        widths = {"mlp": [256, 256, 256]}.get(self.network, [64, 128, 256])
        arch, reward_arch = get_actor_critic_arch({"pi": widths, "qf": [256, 256]} if self.net_arch is None else self.net_arch)
        states = self.plan_of == "states"
        width = get_action_dim(self.network_space if states else self.action_space)
        kwargs = {"observation_space": self.network_space, "history": 2 if states else self.history, **network.kwargs}
        if network.cls is RewardModel:
            n_actions = 0 if states else self.reward_horizon
            return {**kwargs, "net_arch": reward_arch, "activation_fn": self.activation_fn, "n_actions": n_actions}
        noise = {"noise_seed": self.noise_seed, "noise_scale": self.noise_scale}
        model_kwargs = self._model_kwargs(arch, network.kwargs["model_class"] is TrajectoryConsistencyModel)
        return {**kwargs, **noise, "event_shape": (self.horizon, width), "model_kwargs": model_kwargs}

    def _model_kwargs(self, net_arch: list[int], of_student: bool) -> dict[str, Any]:
        given, own = self.model_kwargs or {}, self.student_kwargs or {}
        network_kwargs = {"net_arch": net_arch, "activation_fn": self.activation_fn, **(given.get("network_kwargs") or {})}
        shared = {"network": self.network, "network_kwargs": network_kwargs}
        model_kwargs = {**TRAINING_LEVELS[self.plan_of], **given, **shared}
        if not of_student:
            return model_kwargs
        student = {**model_kwargs, "sampling_steps": self.sampling_steps, **own}
        student["network_kwargs"] = {"dropout": self.dropout, **network_kwargs, **(own.get("network_kwargs") or {})}
        return student

    def optimizer_defaults(self, name: str) -> dict[str, Any]:
        adamw = {"betas": (0.95, 0.999), "weight_decay": WEIGHT_DECAY[name]}
        return adamw if self.optimizer_class is th.optim.AdamW else {}

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
        return super().unscale_plans(plans)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.make_plans(self.repeat(observation), deterministic)[:, 0]

    @property
    def plan_shape(self) -> tuple[int, int]:
        return self.student.plan_shape

    def make_plans(self, history: PyTorchObs, deterministic: bool) -> th.Tensor:
        network, steps = self.planning_with
        return getattr(self, network).plan(self.conditions(history), deterministic, steps)

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
        check_observation(observation)
        obs, vectorized = self.obs_to_tensor(observation)
        plans = self.unscale_plans(getattr(self, network).plan(self.conditions(self.repeat(obs)), deterministic, steps))
        return plans if vectorized else plans[0]

    def observe(self, obs: PyTorchObs, memory: PlanMemory | None, episode_start: np.ndarray | None) -> PlanMemory:
        observed = super().observe(obs, memory, episode_start)
        if self.plan_of == "actions" or memory is None:
            return observed
        old, new = (m.history["desired_goal"][:, -1] for m in (memory, observed))  # type: ignore[index]
        moved = (old != new).any(dim=1).cpu().numpy()
        return observed._replace(age=np.where(moved, NO_PLAN, observed.age))

    def next_actions(self, memory: PlanMemory) -> np.ndarray:
        """
        :param memory: of N environments
        :return: actions in the environment's units, (N, *action shape); with plans of states they pull towards the state
            planned for the next step
        """
        if self.plan_of == "actions":
            return super().next_actions(memory)
        assert isinstance(memory.history, dict)
        plans = self.unscale_plans(th.as_tensor(memory.plan, device=self.device))
        targets = planned_states(plans, memory.age + 1, self.stride)
        pull = forces(memory.history["observation"][:, -1].cpu().numpy(), targets, self.tracking_gains)
        pull = pull.reshape(-1, *self.action_space.shape)
        return np.clip(pull, self.action_space.low, self.action_space.high).astype(self.action_space.dtype)


class PlannerCnnPolicy(PlannerPolicy):
    """:class:`PlannerPolicy` for images: the default features extractor is SB3's ``NatureCNN``."""

    features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN


class PlannerMultiInputPolicy(PlannerPolicy):
    """:class:`PlannerPolicy` for Dict observations: the default features extractor is SB3's ``CombinedExtractor``."""

    features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor
