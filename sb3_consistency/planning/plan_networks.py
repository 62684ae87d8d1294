"""SB3 modules around the planner's pure networks: stacked observations in, plans or returns out."""

import math
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_consistency.data.checks import map_observations
from sb3_consistency.generative.temporal import cosine_transform
from sb3_consistency.options import check_range, option
from sb3_consistency.policies.modules import ActingNetwork, FeatureNetwork, seeded_noise
from sb3_consistency.values.critics import StackedMlp

#: what is planned, and the noise levels it is learned at: the longer and smoother a window, the more noise hides what it does
TRAINING_LEVELS: dict[str, dict[str, float]] = {"actions": {}, "states": {"p_mean": 0.0, "p_std": 1.6}}

#: entries of ``model_kwargs`` that a student starts with from its teacher
SHARED_WITH_TEACHER = ("sigma_min", "sigma_max", "sigma_data")


def check_student_kwargs(student_kwargs: dict[str, Any], model_kwargs: dict[str, Any]) -> None:
    """
    :param student_kwargs: arguments of the student alone
    :param model_kwargs: arguments of teacher and student
    :raises ValueError: if with them the teacher's weights would be another function in the student
    """
    own = {name: student_kwargs[name] for name in SHARED_WITH_TEACHER if name in student_kwargs}
    own |= {name: value for name, value in (student_kwargs.get("network_kwargs") or {}).items() if name != "dropout"}
    teachers = {**model_kwargs, **(model_kwargs.get("network_kwargs") or {})}
    for name, value in own.items():
        if value != teachers.get(name):
            raise ValueError(
                f"policy_kwargs['student_kwargs']: {name} must be the teacher's, with whose weights the student starts: got "
                f"{value!r}; pass it in the same place of model_kwargs, for both."
            )


class StackedNetwork(FeatureNetwork):
    """A network of stacked observations: as many as its ``history``, in a plan of states the state and its goal."""

    def condition(self, stacked: PyTorchObs) -> th.Tensor:
        """
        :param stacked: observations, (B, n, ...), or a dict of them
        :return: their features side by side, (B, n F)
        """
        return self.features(stacked if self.history > 1 else map_observations(lambda x: x[:, 0], stacked))


class PlanNetwork(ActingNetwork, StackedNetwork):
    """Teacher or student: a generative model of scaled plans, conditioned on stacked observations."""

    model_class: Callable[..., Any] = option(
        fixed=True, doc="class of the generative model, called with (event_shape, n F, **model_kwargs)"
    )
    model_kwargs: dict[str, Any] = option(fixed=True, doc="further arguments of the model")
    event_shape: tuple[int, int] = option(fixed=True, doc="shape (H, D) of a plan")

    def build(self) -> None:
        self.model = self.model_class(self.event_shape, self.condition_dim, **self.model_kwargs)

    @property
    def plan_shape(self) -> tuple[int, int]:
        return self.event_shape

    def from_noise(self, obs: PyTorchObs, noise: th.Tensor, deterministic: bool) -> th.Tensor:
        sample = self.model.sample_ode if deterministic else self.model.sample
        plans: th.Tensor = sample(noise, self.features(obs))
        return plans

    def fixed_noise(self, n: int, device: th.device) -> th.Tensor:
        return seeded_noise((1, n, *self.event_shape), self.noise_seed, self.noise_scale, device)

    def plan(self, stacked: PyTorchObs, deterministic: bool = False, steps: int | None = None) -> th.Tensor:
        """
        :param stacked: observations, (B, n, ...), or a dict of them
        :param deterministic: follow the ODE from the fixed noise
        :param steps: jumps of a student, Heun steps of a teacher; None for the model's default
        :return: scaled plans, (B, H, D)
        :raises ValueError: if there are no steps
        """
        check_range("steps", steps, 1, integer=True, optional=True)
        cond = self.condition(stacked)
        shape = self.model.noise_shape(len(cond), steps)
        if not deterministic:
            return self.model.sample(th.randn(shape, device=cond.device), cond)
        return self.model.sample_ode(self.fixed_noise(1, cond.device).expand(shape), cond)


class RewardModel(StackedNetwork):
    """
    R: the return that follows a state and an action (in a plan of states: a state and the goal), scaled to [-1, 1].

    LayerNorm keeps it from rising off the data; the linear shortcuts of the paper's would carry it on. A goal is a position:
    the velocity of a state in its place does not count.
    """

    net_arch: list[int] = option(fixed=True, doc="hidden layer sizes")
    activation_fn: type[nn.Module] = option(fixed=True, doc="activation class")
    n_actions: int = option(
        fixed=True, doc="number of actions that it sees, the first of a plan; 0 where it observes a state and a goal"
    )
    low: th.Tensor = option(init=False)
    high: th.Tensor = option(init=False)
    cosines: th.Tensor = option(init=False)

    def build(self) -> None:
        n_in = self.condition_dim + self.n_actions * self.action_dim
        self.value_net = StackedMlp(n_in, self.net_arch, 1, self.activation_fn, layer_norm=True)
        #: steps of a plan that one value is of
        self.n_seen = max(1, self.n_actions)
        self.register_buffer("cosines", cosine_transform(self.n_seen), persistent=False)
        self.register_buffer("low", th.zeros(()))
        self.register_buffer("high", th.ones(()))

    def condition(self, stacked: PyTorchObs) -> th.Tensor:
        if self.n_actions == 0:
            # it was trained on goals at rest; a student plans to states that may move
            assert isinstance(stacked, th.Tensor)
            stacked = stacked.clone()
            stacked[:, 1, stacked.shape[-1] // 2 :] = 0
        return super().condition(stacked)

    def fit_returns(self, low: float, high: float) -> None:
        """
        Set the range of returns that becomes [-1, 1].

        :param low: lowest return of the data
        :param high: highest return
        """
        self.low.fill_(low)
        # where all returns are equal there is nothing to tell apart: keep their scale
        scale = max(1.0, abs(low))
        self.high.fill_(high if high - low > 1e-6 * scale else low + scale)

    def scale(self, returns: th.Tensor) -> th.Tensor:
        """
        :param returns: returns, any shape
        :return: scaled returns
        """
        return 2 * (returns - self.low) / (self.high - self.low) - 1

    def forward(self, stacked: PyTorchObs, plans: th.Tensor) -> th.Tensor:
        """
        R of a plan's first action (or more of them); of a plan of states, the sum of R over its states.

        Each is capped at 1, the best return of the data: beyond it R can only extrapolate.

        :param stacked: observations, (B, n, ...), or a dict of them
        :param plans: scaled plans, (B, H, D); of plans of actions only the first ``n_actions`` steps matter
        :return: scaled returns, (B,)
        """
        return self.judge(self.condition(stacked), plans, highest=1.0)

    def judge(self, cond: th.Tensor, plans: th.Tensor, highest: float = math.inf) -> th.Tensor:
        """
        As :meth:`forward`, for several plans from the same observations.

        :param cond: what :meth:`condition` makes of them, (B, n F)
        :param plans: scaled plans, (B, H, D)
        :param highest: cap
        :return: scaled returns, (B,)
        """
        if self.n_actions > 0:
            return self.value_net(th.cat([cond, plans[:, : self.n_actions].flatten(1)], dim=-1)).clamp(max=highest).squeeze(-1)
        goals = cond[:, None, self.features_dim :].expand(-1, plans.shape[1], -1)
        values = self.value_net(th.cat([plans, goals], dim=-1).flatten(0, 1)).clamp(max=highest)
        return values.view(plans.shape[:2]).sum(dim=1)
