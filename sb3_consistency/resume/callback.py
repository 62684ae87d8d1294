"""Exact resume: checkpoints from which a killed run continues as if nothing had happened."""

import os
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger

from sb3_consistency.options import check_range
from sb3_consistency.resume.folder import Checkpoint, CheckpointError, latest_checkpoint, list_checkpoints, read_manifest
from sb3_consistency.resume.run_state import (
    callback_tree,
    environment_facts,
    restore_callbacks,
    restore_run,
    save_checkpoint,
    set_random_states,
)
from sb3_consistency.training.updater import TrainingLoop

if TYPE_CHECKING:
    from typing import Self


class ResumableTraining(TrainingLoop):
    """Adds :meth:`load_latest` and :meth:`resume`; a :class:`ResumableCheckpointCallback` writes what they read."""

    _run_id: str | None = None
    _resume_point: dict[str, Any] | None = None
    _root_callback: BaseCallback | None = None
    # offline data, folder and manifest entry of the file that holds it
    _dataset_file: tuple[Any, Path, dict[str, Any]] | None = None

    @classmethod
    def load_latest(cls, folder: str | os.PathLike[str], env: Any = None, device: Any = "auto", **kwargs: Any) -> "Self":
        """
        Load the newest intact checkpoint of a folder, to :meth:`resume` from; a broken one is named in a warning.

        Like SB3's files, checkpoints hold pickles: load only those you trust.

        :param folder: folder that a :class:`ResumableCheckpointCallback` writes to
        :param env: environment, made and wrapped as the interrupted run's; its state is put back
        :param device: device to continue on
        :param kwargs: as for :meth:`load`; with changed hyperparameters the run is no longer the uninterrupted one
        :return: the model
        :raises CheckpointError: if there is no intact checkpoint, it is another class's, or ``env`` is made differently
        """
        return cls._load_checkpoint(latest_checkpoint(folder), env, device, **kwargs)

    @classmethod
    def _load_checkpoint(cls, checkpoint: Checkpoint, env: Any, device: Any, **kwargs: Any) -> "Self":
        ours, theirs = f"{cls.__module__}:{cls.__qualname__}", checkpoint.manifest["class"]
        if ours != theirs:
            raise CheckpointError(f"folder: {checkpoint.path} is a checkpoint of {theirs}, not of {ours}: use that class.")
        path: Any = checkpoint.file("model.zip")
        model: Any = cls.load(path, env=env, device=device, force_reset=False, **kwargs)
        _warn_of_differences(checkpoint.manifest["environment"], environment_facts(model))
        model._resume_point = restore_run(model, checkpoint)
        model.last_checkpoint = str(checkpoint.path)
        return model

    @property
    def interrupted_phase(self) -> str | None:
        """Phase that :meth:`resume` continues: "offline", "online", or None if there is no interrupted run."""
        return None if self._resume_point is None else str(self._resume_point["phase"])

    def resume(self, callback: MaybeCallback = None, progress_bar: bool = False) -> "Self":
        """
        Continue the call of :meth:`learn` or :meth:`pretrain` that was interrupted, with its arguments, to its end.

        :param callback: callback(s), given anew; the counters of SB3's continue
        :param progress_bar: show a progress bar
        :return: the model
        :raises ValueError: if the model does not come from :meth:`load_latest`, or has no environment to go on in
        """
        point, call = self._resume_point, self._call
        if point is None or call is None:
            raise ValueError("resume: there is no interrupted run; get the model from load_latest(folder, env=...).")
        normalised = point["env"] is not None and "VecNormalize" in point["env"].classes
        if self.env is None and (point["phase"] == "online" or normalised):
            raise ValueError("env: the interrupted run had an environment; pass one made like it to load_latest(env=...).")
        method, arguments = call
        self._continued_phase = self.interrupted_phase
        try:
            getattr(self, method)(callback=callback, progress_bar=progress_bar, **arguments)
        finally:
            self._continued_phase = None
        # of a run that was at its end
        self._enter_loop()
        return self

    def _enter_loop(self) -> None:
        """The last moment before a loop goes on: whatever was set up since has left its trace in the random states."""
        point, self._resume_point, self._continued_phase = self._resume_point, None, None
        if point is not None:
            restore_callbacks(self._root_callback, point["callbacks"])
            set_random_states(point["random"])
            self.start_time = time.time_ns() - point["elapsed"]

    def _offline_steps(self, *args: Any) -> bool:
        if self._continued_phase is not None:
            self._enter_loop()
        return super()._offline_steps(*args)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> Any:
        if self._continued_phase is not None:
            self._enter_loop()
        return super().collect_rollouts(*args, **kwargs)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self._continued_phase is None:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        # SB3 would begin anew: counters, action noise, environment
        self.start_time = time.time_ns()
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, False)
        return self._total_timesteps, self._init_callback(callback, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self._continued_phase is None:
            # a new run: the interrupted one is given up
            self._resume_point = None
        self._root_callback = super()._init_callback(callback, progress_bar)
        for each in callback_tree(self._root_callback):
            if isinstance(each, EveryNTimesteps):
                # SB3 leaves it waiting for a number of timesteps that was reached before counting began anew
                each.last_time_trigger = min(each.last_time_trigger, self.num_timesteps)
        return self._root_callback

    def _excluded_save_params(self) -> list[str]:
        ours = ["last_checkpoint", "_resume_point", "_root_callback", "_dataset_file", "_continued_phase"]
        return [*super()._excluded_save_params(), *ours]


def _warn_of_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    changes = [f"{key} {theirs.get(key)} -> {value}" for key, value in ours.items() if theirs.get(key) != value]
    if changes:
        warnings.warn(
            f"This is not what the checkpoint was written with: {', '.join(changes)}. The run continues, perhaps not bit for "
            "bit as without the interruption.",
            stacklevel=4,
        )


def load_latest(folder: str | os.PathLike[str], env: Any = None, device: Any = "auto", **kwargs: Any) -> Any:
    """
    Load the newest intact checkpoint of a folder, whichever algorithm wrote it; see ``load_latest`` of the algorithms.

    :param folder: folder that a :class:`ResumableCheckpointCallback` writes to
    :param env: environment, made and wrapped as the interrupted run's
    :param device: device to continue on
    :param kwargs: as for ``load``
    :return: the model
    :raises CheckpointError: if there is no intact checkpoint, its class can't be found, or ``env`` is made differently
    """
    checkpoint = latest_checkpoint(folder)
    module, _, name = checkpoint.manifest["class"].partition(":")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"folder: the class {module}.{name} of {checkpoint.path} can't be imported; call load_latest of the class itself."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, ResumableTraining)):
        raise CheckpointError(f"folder: {checkpoint.path} was written by {module}.{name}, which is none of our algorithms.")
    return cls._load_checkpoint(checkpoint, env, device, **kwargs)


class ResumableCheckpointCallback(BaseCallback):
    """
    Writes checkpoints from which :func:`load_latest` continues a run as if it had never stopped, bit for bit on a CPU.

    They are written between two rollouts (offline: between two chunks of 64 batches), and at the end. A write that is
    killed, or fails for lack of space, leaves the earlier checkpoints as they were; after a failure training goes on.

    :param folder: folder for the checkpoints of one run
    :param save_freq: timesteps between two (environment steps of all environments together; offline gradient steps)
    :param keep: checkpoints to keep; there must be room on the disk for one more
    :param verbose: 1 to print what is written
    :raises ValueError: if ``save_freq`` or ``keep`` is less than 1, or it is inside an ``EventCallback``
    """

    def __init__(self, folder: str | os.PathLike[str], save_freq: int, keep: int = 2, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_range("save_freq", save_freq, 1)
        check_range("keep", keep, 1, integer=True)
        self.folder = Path(folder)
        self.save_freq = save_freq
        self.keep = keep
        self._saved_at = 0
        self._between_rollouts = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableTraining):
            raise TypeError(f"ResumableCheckpointCallback: {type(self.model).__name__} can't resume; use CheckpointCallback.")
        if self.parent is not None:
            # such callbacks hand on steps only
            raise ValueError(f"ResumableCheckpointCallback: give it to learn() itself, not to {type(self.parent).__name__}.")
        checkpoints = list_checkpoints(self.folder)
        if checkpoints and self._run_of(checkpoints[-1]) != self.model._run_id:
            warnings.warn(
                f"{self.folder} has checkpoints of another run, which this one will replace; until then load_latest() loads "
                "those. Give each run a folder of its own.",
                stacklevel=2,
            )

    @staticmethod
    def _run_of(path: Path) -> str | None:
        try:
            return str(read_manifest(path)["run"])
        except CheckpointError:
            return None

    def _on_training_start(self) -> None:
        self._saved_at = self.model.num_timesteps
        self._between_rollouts = False

    def _on_rollout_start(self) -> None:
        self._between_rollouts = False
        if self.model.num_timesteps - self._saved_at >= self.save_freq:
            self._save()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._between_rollouts = True

    def _on_training_end(self) -> None:
        # a callback that stops a run does so in the middle of a rollout: there the last checkpoint stands
        if self._between_rollouts and self.model.num_timesteps != self._saved_at:
            self._save()

    def _save(self) -> None:
        model: Any = self.model
        self._saved_at = model.num_timesteps
        try:
            model.last_checkpoint = str(save_checkpoint(model, self.folder, self.keep))
        except OSError as error:
            last = (
                "there is none yet" if model.last_checkpoint is None else f"the last one, {model.last_checkpoint}, is intact"
            )
            warnings.warn(
                f"The checkpoint of step {model.num_timesteps} could not be written to {self.folder} ({error}); {last}. "
                f"Training goes on; the next attempt is in {self.save_freq} steps.",
                stacklevel=2,
            )
            return
        if self.verbose >= 1:
            print(f"Checkpoint of step {model.num_timesteps}: {model.last_checkpoint}")
