"""Training in stages: which network a gradient step trains, with which learning rate, and a teacher taken from a file."""

import io
import pathlib
from itertools import zip_longest
from typing import Any, ClassVar

from stable_baselines3.common.type_aliases import GymEnv, TensorDict
from stable_baselines3.common.utils import update_learning_rate

from sb3_consistency.options import check_range
from sb3_consistency.planning.planner import PlannerPolicy
from sb3_consistency.training.algorithm import GenerativeAlgorithm

STAGES = ("teacher", "reward", "student")
NETWORK_OF_STAGE = {"teacher": "teacher_model", "reward": "reward_model", "student": "student"}


class StagedAlgorithm(GenerativeAlgorithm):
    """
    A teacher, a reward model and a student, trained one after the other in one run.

    :param teacher_steps: gradient steps of the teacher stage; a float is a share of the run
    :param reward_steps: gradient steps of the reward stage, likewise; the student takes what is left of the run
    :param teacher: file of a saved model whose teacher is taken over; the teacher stage is left out then
    :param warmup_steps: gradient steps over which the learning rate rises in every stage, at most a tenth of it
    """

    policy: PlannerPolicy  # type: ignore[assignment]
    #: arguments that a teacher must have been trained with
    teacher_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *args: Any,
        teacher_steps: int | float,
        reward_steps: int | float,
        teacher: str | None,
        warmup_steps: int,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        self.teacher_steps = teacher_steps
        self.reward_steps = reward_steps
        self.teacher = teacher
        self.warmup_steps = warmup_steps
        self._student_started = False
        super().__init__(*args, _init_setup_model=_init_setup_model, **kwargs)
        if teacher is not None and _init_setup_model:
            self._take_teacher(teacher)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        # a teacher that is given needs no stage of its own
        lengths = {"teacher_steps": 0 if self.teacher else self.teacher_steps, "reward_steps": self.reward_steps}
        for name, length in lengths.items():
            check_range(name, length, 0, 1 if isinstance(length, float) else float("inf"))
        if sum(x for x in lengths.values() if isinstance(x, float)) >= 1:
            got = f"{self.teacher_steps}, {self.reward_steps}"
            raise ValueError(f"teacher_steps and reward_steps leave the student no share of the run, got {got}.")
        check_range("warmup_steps", self.warmup_steps, 0, integer=True)

    @property
    def stage(self) -> str:
        """Stage of the next gradient step: "teacher", "reward" or "student"."""
        return STAGES[sum(self._n_updates >= end for end in self.stage_ends())]

    def stage_ends(self) -> tuple[int, int]:
        """
        :return: numbers of gradient steps at which the teacher and the reward stage end
        """
        run = self.curriculum_steps or self._curriculum_end or 0
        lengths = (0 if self.teacher else self.teacher_steps, self.reward_steps)
        # a share, however small, is at least one step
        steps = [max(1, round(n * run)) if isinstance(n, float) and n > 0 else int(n) for n in lengths]
        return steps[0], steps[0] + steps[1]

    def _stage_progress(self) -> tuple[float, int]:
        """Share of the present stage that is done, and its length."""
        ends = [0, *self.stage_ends(), self.curriculum_steps or self._curriculum_end or 0]
        i = STAGES.index(self.stage)
        start, end = ends[i], ends[i + 1]
        if self._n_updates >= end:
            # beyond the planned run, every call is a stage of its own
            call_start = self._n_updates - (self.num_timesteps - self._num_timesteps_at_start)
            start, end = max(start, end, call_start), self._n_updates + self._total_timesteps - self.num_timesteps
        length = max(1, end - start)
        return (self._n_updates - start) / length, length

    def _update_learning_rates(self) -> None:
        progress, length = self._stage_progress()
        warmup = min(self.warmup_steps, length // 10)
        factor = min(1.0, (progress * length + 1) / (warmup + 1)) * self._cosine_decay(progress)
        schedule = self._actor_rate if self.stage == "student" else self.lr_schedule
        rate = factor * schedule(1 - progress)
        update_learning_rate(getattr(self.policy, NETWORK_OF_STAGE[self.stage]).optimizer, rate)
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/stage", STAGES.index(self.stage))

    def _begin_stage(self) -> None:
        network = NETWORK_OF_STAGE[self.stage]
        if self.policy.in_training != network:
            self.policy.in_training = network
            self.policy.set_training_mode(self.policy.training)
        if network == "student" and not self._student_started:
            self.policy.warm_start_student()
            self._student_started = True

    def _gradient_step(self, batch: Any) -> TensorDict:
        self._begin_stage()
        self._update_learning_rates()
        return super()._gradient_step(batch)

    def target_weights(self) -> list[float]:
        # of a step that belonged to the teacher stage; power 0.75 as in the released code
        in_stage = self._n_updates <= self.stage_ends()[0]
        return [max(1e-4, (1 + self._n_updates) ** -0.75) if in_stage else 0.0]

    def _take_teacher(self, path: str) -> None:
        try:
            # the seed, because loading draws random numbers
            source = type(self).load(path, device=self.device, seed=self.seed, buffer_size=1)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"teacher: {error} Pass a file of {type(self).__name__}.save().") from error
        for name in self.teacher_arguments:
            theirs, ours = getattr(source, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(f"teacher: {path} was trained with {name}={theirs!r}, this model has {ours!r}.")
        prefixes = ("teacher_model.", "teacher_ema.")
        dicts = (source.policy.state_dict(), self.policy.state_dict())
        weights, own = ({key: w for key, w in d.items() if key.startswith(prefixes)} for d in dicts)
        differing = {(key, w.shape) for key, w in weights.items()} ^ {(key, w.shape) for key, w in own.items()}
        if differing:
            raise ValueError(
                f"teacher: the networks in {path} have other weights ({min(differing)[0]}, for one); use the same spaces, "
                "policy_kwargs and version of this package, or train a new teacher."
            )
        # weights of one shape may still be another function: noise levels, activations
        printed = (str(model.policy.teacher_model).splitlines() for model in (source, self))
        for theirs, ours in zip_longest(*printed, fillvalue=""):
            if theirs != ours:
                raise ValueError(
                    f"teacher: {path} was trained with {theirs.strip()}, this model has {ours.strip()}; use the same "
                    "policy_kwargs, or train a new teacher."
                )
        self.policy.load_state_dict(weights, strict=False)
        self.policy.share_normalizer()

    @classmethod
    def load(  # type: ignore[override]
        cls, path: str | pathlib.Path | io.BufferedIOBase, env: GymEnv | str | None = None, **kwargs: Any
    ) -> Any:
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
