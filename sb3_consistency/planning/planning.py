"""A planner that is trained in three stages, offline: teacher, reward model, student."""

import io
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.generative.edm import EDMModel
from sb3_consistency.generative.trajectory import TrajectoryConsistencyModel
from sb3_consistency.options import check_range, option
from sb3_consistency.planning.plan_data import PlanData
from sb3_consistency.planning.plan_networks import check_student_kwargs
from sb3_consistency.planning.planner import PlannerCnnPolicy, PlannerMultiInputPolicy, PlannerPolicy, PlanOptions
from sb3_consistency.planning.stages import NETWORK_OF_STAGE, STAGES, stage_ends, take_teacher
from sb3_consistency.resume.run_state import callback_tree
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.offline_data import OfflineData

if TYPE_CHECKING:
    from typing import Self


def _check_length(name: str, value: Any) -> None:
    check_range(name, value, 0, 1 if isinstance(value, float) else float("inf"))


class PlanningAlgorithm(PlanOptions, GenerativeAlgorithm):
    """A teacher, a reward model and a student, trained one after the other in one run."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": PlannerPolicy,
        "CnnPolicy": PlannerCnnPolicy,
        "MultiInputPolicy": PlannerMultiInputPolicy,
    }
    data_class: ClassVar[type[OfflineData]] = PlanData
    offline_only: ClassVar[bool] = True
    #: arguments that a teacher must have been trained with
    teacher_arguments: ClassVar[tuple[str, ...]] = ("plan_of", "horizon", "stride", "history")

    cut_at_goals: bool = option(
        default=True, fixed=True, doc="whether, for plans of states, a window ends where the goal changes, too"
    )
    teacher_steps: int | float = option(
        default=0.4,
        check=_check_length,
        doc="gradient steps of the teacher stage; a float is a share of the run",
        search=(0.2, 0.6),
    )
    reward_steps: int | float = option(
        default=0.1,
        check=_check_length,
        doc="gradient steps of the reward stage, likewise; the student takes what is left of the run",
    )
    teacher: str | None = option(
        default=None,
        fixed=True,
        doc="file of a saved model whose teacher is taken over; the teacher stage is left out then",
    )
    warmup_steps: int = option(
        default=500,
        low=0,
        doc="gradient steps over which the learning rate rises in every stage, at most a tenth of it",
    )

    def construct(self, values: dict[str, Any]) -> None:
        super().construct(values)
        if values["_init_setup_model"]:  # what was saved was accepted once
            check_student_kwargs(*(self.policy_kwargs.get(name) or {} for name in ("student_kwargs", "model_kwargs")))
            self._check_stages()
            if self.teacher is not None:
                take_teacher(self, self.teacher, self.teacher_arguments)

    def _check_stages(self) -> None:
        """The student learns from nothing that has random weights."""
        if self.teacher_steps == 0 and self.teacher is None:
            raise ValueError("teacher_steps must be above 0, got 0: the student learns from the teacher. Or pass teacher=.")
        if self.reward_steps == 0 and self.needs_rewards:
            raise ValueError("reward_steps must be above 0, got 0: the student climbs rewards. Or pass reward_weight=0.")

    def check_together(self) -> None:
        super().check_together()
        # a teacher that is given needs no stage of its own
        lengths = (0 if self.teacher else self.teacher_steps, self.reward_steps)
        if sum(x for x in lengths if isinstance(x, float)) >= 1:
            got = f"{self.teacher_steps}, {self.reward_steps}"
            raise ValueError(f"teacher_steps and reward_steps leave the student no share of the run, got {got}.")
        if self.plan_of == "actions" and self.stride != 1:
            raise ValueError(f"stride must be 1 with plan_of='actions', whose plans have every action, got {self.stride}.")
        if self.plan_of == "states" and not self.normalize_observations:
            raise ValueError("normalize_observations must be True with plan_of='states', whose plans are scaled observations.")
        if self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, HerReplayBuffer):
            raise ValueError("replay_buffer_class can't be HerReplayBuffer: windows have goals in hindsight of their own.")

    @property
    def model_classes(self) -> dict[str, type[Any]]:
        return {"model_kwargs": EDMModel, "student_kwargs": TrajectoryConsistencyModel}

    # stages

    @property
    def stage(self) -> str:
        """Stage of the next gradient step: "teacher", "reward" or "student"."""
        return STAGES[sum(self._n_updates >= end for end in self.stage_ends())]

    def stage_ends(self) -> tuple[int, int]:
        """
        :return: numbers of gradient steps at which the teacher and the reward stage end
        """
        run = self.curriculum_steps or self.run.curriculum_end or 0
        return stage_ends(0 if self.teacher else self.teacher_steps, self.reward_steps, run)

    def _stage_progress(self) -> tuple[float, int]:
        """Share of the present stage that is done, and its length."""
        ends = [0, *self.stage_ends(), self.curriculum_steps or self.run.curriculum_end or 0]
        i = STAGES.index(self.stage)
        start, end = ends[i], ends[i + 1]
        if self._n_updates >= end:
            # beyond the planned run, every call is a stage of its own
            call_start = self._n_updates - (self.num_timesteps - self._num_timesteps_at_start)
            start, end = max(start, end, call_start), self._n_updates + self._total_timesteps - self.num_timesteps
        length = max(1, end - start)
        return (self._n_updates - start) / length, length

    def update_learning_rates(self) -> None:
        progress, length = self._stage_progress()
        warmup = min(self.warmup_steps, length // 10)
        factor = min(1.0, (progress * length + 1) / (warmup + 1)) * self.cosine_decay(progress)
        schedule = self.actor_rate if self.stage == "student" else self.lr_schedule
        rate = factor * schedule(1 - progress)
        update_learning_rate(getattr(self.policy, NETWORK_OF_STAGE[self.stage]).optimizer, rate)
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/stage", STAGES.index(self.stage))

    def _begin_stage(self) -> None:
        network = NETWORK_OF_STAGE[self.stage]
        if self.policy.in_training != network:
            self.policy.in_training = network
            self.policy.set_training_mode(self.policy.training)
        if network == "student" and not self.run.student_started:
            self.policy.warm_start_student()
            self.run.student_started = True

    def gradient_step(self, batch: Any) -> TensorDict:
        self._begin_stage()
        self.update_learning_rates()
        return super().gradient_step(batch)

    def teacher_ema_share(self, n_updates: int) -> float:
        """
        How far the teacher's moving average follows in its stage: power 0.75, as in the released code.

        :param n_updates: number of updates
        :return: how far it moves towards the teacher
        """
        return max(1e-4, (1 + n_updates) ** -0.75) if n_updates <= self.stage_ends()[0] else 0.0

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
            name, slowly = type(self).__name__, "Or plan slowly: with model.planning_with('teacher'), or by teacher_plan(...)."
            if self._n_updates == 0:
                raise RuntimeError(f"{name} plans with its student, and has not been trained: learn(n). {slowly}")
            teacher_end, reward_end = self.stage_ends()
            raise RuntimeError(
                f"{name} plans with its student, and this model is in its {self.stage} stage: it has taken {self._n_updates} "
                f"gradient steps, the teacher stage ends at {teacher_end}, the reward stage at {reward_end}: train on. "
                f"{slowly}"
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

    @classmethod
    def load(  # type: ignore[override]
        cls, path: str | pathlib.Path | io.BufferedIOBase, env: GymEnv | str | None = None, **kwargs: Any
    ) -> "Self":
        """
        Load a model; see :meth:`GenerativeAlgorithm.load`.

        :param path: file that :meth:`save` wrote
        :param env: environment to train in, or its id
        :param kwargs: SB3's further arguments, and constructor arguments to change, except ``teacher``
        :return: the model
        :raises ValueError: if ``teacher`` is not the model's own
        """
        others = {name: value for name, value in kwargs.items() if name != "teacher"}
        model = super().load(path, env, **others)
        teacher = kwargs.get("teacher", model.teacher)
        if teacher != model.teacher:
            raise ValueError(
                f"teacher: load() takes no other teacher than the model's own, {model.teacher!r}, got {teacher!r}; "
                f"pass it to {cls.__name__}(...), which begins with it."
            )
        return model


def _evaluate_if_acting(evaluation: EvalCallback, evaluate: Callable[[], bool]) -> bool:
    """Evaluations start with the student stage: a run's callbacks are given once, for all its stages."""
    # of the model that the callback is given to now, which may be another than at first
    return evaluate() if getattr(evaluation.model, "can_act", True) else True
