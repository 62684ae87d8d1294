"""What a planner adds to training in stages: batches of windows, and planning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, PyTorchObs
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.buffer import (
    BlockWriter,
    EpisodeConverter,
    ObservationStatistics,
    block_rows,
    converted_episodes,
    set_size,
)
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.envs.spaces import is_normalised_space
from sb3_consistency.generative.edm import EDMModel
from sb3_consistency.generative.trajectory import TrajectoryConsistencyModel
from sb3_consistency.options import check_choice, check_flags, check_pair, check_range
from sb3_consistency.planning.plan_networks import check_student_kwargs
from sb3_consistency.planning.planner import PLANS, PlannerCnnPolicy, PlannerMultiInputPolicy, PlannerPolicy
from sb3_consistency.planning.stages import StagedAlgorithm
from sb3_consistency.planning.windows import WindowRows, Windows
from sb3_consistency.resume.run_state import callback_tree
from sb3_consistency.training.batches import split, tree_map
from sb3_consistency.training.pretraining import HELDOUT_ROWS


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


class PlanningAlgorithm(StagedAlgorithm):
    """
    A planner that is trained in three stages, offline.

    :param plan_of: "actions": plan the next actions and replan; "states": plan the states to a goal and track them
    :param horizon: number H of actions or states of a plan
    :param stride: steps of the environment from one planned state to the next; plans of actions have all, 1
    :param history: number of observations that a plan of actions is conditioned on
    :param executed_steps: environment steps until the next plan is made; None for 1 (actions) or the plan's own, (H - 1)
        ``stride`` (states). More than that hold the end of a plan of states at rest; more than an episode has are the
        paper's open loop
    :param tracking_gains: gains of position and velocity of the controller that tracks a plan of states
    :param pad: whether windows may run past the end of an episode, repeating its last action (or state, at rest)
    :param cut_at_goals: whether, for plans of states, a window ends where the goal changes, too
    :param kwargs: see :class:`~sb3_consistency.planning.stages.StagedAlgorithm`
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": PlannerPolicy,
        "CnnPolicy": PlannerCnnPolicy,
        "MultiInputPolicy": PlannerMultiInputPolicy,
    }
    offline_only: ClassVar[bool] = True
    teacher_arguments: ClassVar[tuple[str, ...]] = ("plan_of", "horizon", "stride", "history")
    _windows: Windows | None = None

    def __init__(
        self,
        *args: Any,
        plan_of: str,
        horizon: int,
        stride: int,
        history: int,
        executed_steps: int | None,
        tracking_gains: tuple[float, float],
        pad: bool,
        cut_at_goals: bool,
        **kwargs: Any,
    ) -> None:
        self.plan_of = plan_of
        self.horizon = horizon
        self.stride = stride
        self.history = history
        self.executed_steps = executed_steps
        self.tracking_gains = tracking_gains
        self.pad = pad
        self.cut_at_goals = cut_at_goals
        super().__init__(*args, **kwargs)
        if kwargs.get("_init_setup_model", True):  # what was saved was accepted once
            check_student_kwargs(*(self.policy_kwargs.get(name) or {} for name in ("student_kwargs", "model_kwargs")))

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("plan_of", self.plan_of, PLANS)
        for name in ("horizon", "stride", "history"):
            check_range(name, getattr(self, name), 1, integer=True)
        if self.plan_of == "actions" and self.stride != 1:
            raise ValueError(f"stride must be 1 with plan_of='actions', whose plans have every action, got {self.stride}.")
        if self.plan_of == "states" and not self.normalize_observations:
            raise ValueError("normalize_observations must be True with plan_of='states', whose plans are scaled observations.")
        check_flags(pad=self.pad, cut_at_goals=self.cut_at_goals)
        check_pair("tracking_gains", self.tracking_gains, 0)
        if self.n_steps != 1:
            raise ValueError(f"n_steps must be 1: a planner has no bootstrapped targets, got {self.n_steps}.")
        if self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, HerReplayBuffer):
            raise ValueError("replay_buffer_class can't be HerReplayBuffer: windows have goals in hindsight of their own.")

    def policy_options(self) -> dict[str, Any]:
        names = ("plan_of", "horizon", "stride", "history", "executed_steps", "tracking_gains")
        return {"model_kwargs": {}, **{name: getattr(self, name) for name in names}}

    def _model_classes(self) -> dict[str, type[Any]]:
        return {"model_kwargs": EDMModel, "student_kwargs": TrajectoryConsistencyModel}

    # batches

    def windows(self) -> Windows:
        """
        :return: the windows of the offline data
        :raises DatasetError: if no episode is long enough and ``pad`` is off
        """
        buffer = self._offline_data()
        assert buffer is not None
        if self._windows is None or self._windows.buffer is not buffer:
            self._windows = self._windows_of(buffer)
        return self._windows

    def _windows_of(self, buffer: ReplayBuffer) -> Windows:
        goal_key = "desired_goal" if self.plan_of == "states" and self.cut_at_goals else None
        return Windows(buffer, self.horizon, self.history, self.pad, self.gamma, goal_key, self.stride)

    def _read_heldout(self, converters: list[EpisodeConverter], held: list[np.ndarray]) -> dict[str, Any] | None:
        """Held-out episodes keep their order, in a buffer of their own: windows are taken from it."""
        episodes = [e for converter, h in zip(converters, held, strict=True) for e in converted_episodes(converter, h)]
        if not episodes:
            return None
        size = sum(len(e) for e in episodes)
        if size < self.n_envs:
            raise DatasetError(
                f"heldout_fraction: the held-out episodes have {size} transition(s), fewer than there are environments "
                f"({self.n_envs}), each of which gets windows: hold out more, or use fewer environments."
            )
        rows = block_rows(size, self.n_envs)
        buffer = self._new_buffer((rows + int(self.optimize_memory_usage)) * self.n_envs)
        writer = BlockWriter(buffer, 0, size)
        for episode in episodes:
            writer.write(episode)
        set_size(buffer, rows)
        return {"windows": self._windows_of(buffer)}

    @th.no_grad()
    def heldout_loss(self, heldout: dict[str, Any]) -> float:
        """
        :param heldout: windows of the held-out episodes
        :return: denoising loss of the teacher, or of the student in its stage, with the same noise at every call
        """
        self.policy.set_training_mode(False)
        windows = heldout["windows"]
        chosen = np.linspace(0, len(windows) - 1, min(HELDOUT_ROWS, len(windows))).astype(int)
        batch = self._plan_batch(windows, windows.at(windows.starts[chosen]))
        network = self.policy.student if self.stage == "student" else self.policy.teacher_model
        generator = th.Generator().manual_seed(0)
        noise = th.randn(batch.plans.shape, generator=generator).to(self.device)
        u = th.rand(len(chosen), 2, generator=generator).to(self.device)
        loss = network.model.denoising_loss(batch.plans, network.condition(batch.conditions), noise=noise, u=u)[0]
        return float(loss.mean())

    def _sample_batches(self, n_batches: int, batch_size: int) -> list[Any]:
        windows = self.windows()
        return split(self._plan_batch(windows, windows.sample(n_batches * batch_size, self._segments)), n_batches)

    def _plan_batch(self, windows: Windows, at: WindowRows) -> PlanBatch:
        buffer, normalise = windows.buffer, windows.buffer._normalize_obs
        observed = normalise(windows.take(buffer.observations, at.past, at.columns), self._vec_normalize_env)
        history = tree_map(buffer.to_torch, observed)
        conditions = reward_conditions = self.policy.conditions(history)
        if self.plan_of == "actions":
            plans = buffer.to_torch(windows.take(buffer.actions, at.rows, at.columns))
        else:
            states = windows.take(buffer.observations["observation"], at.rows, at.columns)
            # waiting at the end of an episode is being at rest there
            states[..., states.shape[-1] // 2 :][at.padded] = 0
            plans = buffer.to_torch(states)
            conditions = plans[:, [0, -1]]
        returns = self.policy.reward_model.scale(buffer.to_torch(windows.returns[at.rows[:, 0], at.columns[:, 0]]))
        return PlanBatch(conditions, reward_conditions, self.policy.scale_plans(plans), returns)

    def _fit_statistics(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        vec_normalize = self._vec_normalize_env
        if self.plan_of == "states" and vec_normalize is not None and vec_normalize.norm_obs:
            raise ValueError("env: plan_of='states' plans in the environment's units: use VecNormalize(norm_obs=False).")
        super()._fit_statistics(statistics, buffer, n_rows)

    def _install(self, buffer: ReplayBuffer) -> None:
        self._windows = self._windows_of(buffer)
        super()._install(buffer)
        # other data, or another gamma, may come while R has not learned yet
        if self._n_updates <= self.stage_ends()[0]:
            returns = self._windows.returns[: buffer.size()]
            self.policy.reward_model.fit_returns(float(returns.min()), float(returns.max()))

    def _fit_normalizer(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        """Centre and half range in the place of mean and deviation: min-max scaling to [-1, 1]."""
        if self.teacher is not None:
            return  # its observations stay scaled as they were
        observations: Any = buffer.observations
        if self.plan_of == "states":
            observations = observations["observation"]
        entries = observations if isinstance(observations, dict) else {"": observations}
        space = self.policy.network_space
        kept = {k: x[:n_rows] for k, x in entries.items() if is_normalised_space(space[k] if k else space)}  # type: ignore[index]
        low = {k: x.min(axis=(0, 1)) for k, x in kept.items()}
        high = {k: x.max(axis=(0, 1)) for k, x in kept.items()}
        self.policy.fit_normalizer({k: (high[k] + low[k]) / 2 for k in kept}, {k: (high[k] - low[k]) / 2 for k in kept})

    # acting

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callback = super()._init_callback(callback, progress_bar)
        for each in callback_tree(callback):
            # not again in a later call
            if isinstance(each, EvalCallback) and getattr(each._on_step, "func", None) is not _evaluate_if_acting:
                each._on_step = partial(_evaluate_if_acting, each, each._on_step)  # type: ignore[method-assign]
        return callback

    @property
    def can_act(self) -> bool:  # type: ignore[override]
        """Whether ``predict`` can plan: the student stage has begun, or the teacher plans."""
        return self.stage == "student" or self.policy.planning_with[0] != "student"

    @contextmanager
    def planning_with(self, network: str, steps: int | None = None) -> Iterator[None]:
        """
        Within this context ``predict`` plans so: to evaluate the teacher, or several jumps of the student.

        :param network: "student", or "teacher" (its moving average, in every stage)
        :param steps: jumps of the student, or Heun steps of the teacher; None for the default
        :raises ValueError: if the network is unknown
        """
        if network not in ("student", "teacher"):
            raise ValueError(f"network must be 'student' or 'teacher', got {network!r}.")
        before = self.policy.planning_with
        self.policy.planning_with = ("student" if network == "student" else "teacher_ema", steps)
        try:
            yield
        finally:
            self.policy.planning_with = before

    def _require_student(self) -> None:
        if self.stage != "student":
            teacher_end, reward_end = self.stage_ends()
            raise RuntimeError(
                f"{type(self).__name__} acts from its student stage on, and this model is in its {self.stage} stage: it has "
                f"taken {self._n_updates} gradient steps, the teacher stage ends at {teacher_end}, the reward stage at "
                f"{reward_end}. Train on, or plan slowly: with model.planning_with('teacher'), or by teacher_plan(...)."
            )
        self._begin_stage()

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """
        Act on a plan; see :meth:`PlannerPolicy.predict` for the parameters.

        :raises RuntimeError: before the student stage, unless the teacher plans (:meth:`planning_with`)
        """
        if self.policy.planning_with[0] == "student":
            self._require_student()
        return self.policy.predict(observation, state, episode_start, deterministic)

    def plan(self, observation: Any, *, deterministic: bool = False, steps: int | None = None) -> np.ndarray:
        """
        Plan with the student.

        :param observation: one observation or a batch of them
        :param deterministic: follow the ODE from the fixed noise
        :param steps: number of jumps, each one network pass; None for ``sampling_steps``
        :return: the plan in the environment's units: actions (H, *shape) or states (H, S); with a batch in front
        :raises RuntimeError: before the student stage
        """
        self._require_student()
        return self.policy.plan(observation, deterministic, steps)

    def teacher_plan(self, observation: Any, *, deterministic: bool = False, steps: int | None = None) -> np.ndarray:
        """
        Plan with the moving average of the teacher, by Heun's method: slow, and possible in every stage.

        :param observation: one observation or a batch of them
        :param deterministic: follow the ODE from the fixed noise
        :param steps: Heun steps, each two network passes; None for those of the teacher's grid
        :return: the plan, as for :meth:`plan`
        """
        return self.policy.plan(observation, deterministic, steps, "teacher_ema")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_windows"]


def _evaluate_if_acting(evaluation: EvalCallback, evaluate: Callable[[], bool]) -> bool:
    """Evaluations start with the student stage: a run's callbacks are given once, for all its stages."""
    # of the model that the callback is given to now, which may be another than at first
    return evaluate() if getattr(evaluation.model, "can_act", True) else True
