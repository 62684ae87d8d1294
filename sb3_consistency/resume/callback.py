"""Exact resume: checkpoints from which a killed run continues as if nothing had happened."""

import os
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

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


class Resumption:
    """
    What a model knows of the run that it continues; nothing of it is saved with a model.

    A model that can be resumed has one as ``resumption``, tells it of its callbacks, asks it whether a loop continues, and
    has ``run`` (with ``id`` and ``call``), ``data``, ``memory`` (what its policy remembers of the environments) and
    ``new_buffer`` for :mod:`~sb3_consistency.resume.run_state`.

    :ivar point: what was restored from a checkpoint; None where nothing is to be continued
    :ivar continued_phase: phase ("offline", "online") of the call that is about to be continued, if one is
    :ivar root_callback: the tree of callbacks of the present call
    :ivar last_checkpoint: path of the newest checkpoint of this run
    :ivar dataset_file: offline data, folder and manifest entry of the file that holds it
    """

    def __init__(self) -> None:
        self.point: dict[str, Any] | None = None
        self.continued_phase: str | None = None
        self.root_callback: BaseCallback | None = None
        self.last_checkpoint: str | None = None
        self.dataset_file: tuple[Any, Path, dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # for copies and pickles: callbacks hold on to whole modules
        return {**vars(self), "root_callback": None}

    @property
    def interrupted_phase(self) -> str | None:
        """Phase that :meth:`resume` continues, or None if there is no interrupted run."""
        return None if self.point is None else str(self.point["phase"])

    def resume(self, model: Any, callback: MaybeCallback, progress_bar: bool) -> None:
        """
        Continue the call of ``learn`` or ``pretrain`` that was interrupted, with its arguments, to its end.

        :param model: the model
        :param callback: callback(s), given anew; the counters of SB3's continue
        :param progress_bar: show a progress bar
        :raises ValueError: if there is no interrupted run, or no environment to go on in
        """
        point, call = self.point, model.run.call
        if point is None or call is None:
            raise ValueError("resume: there is no interrupted run; get the model from load_latest(folder, env=...).")
        normalised = point["env"] is not None and "VecNormalize" in point["env"].classes
        if model.env is None and (point["phase"] == "online" or normalised):
            raise ValueError("env: the interrupted run had an environment; pass one made like it to load_latest(env=...).")
        method, arguments = call
        self.continued_phase = self.interrupted_phase
        try:
            getattr(model, method)(callback=callback, progress_bar=progress_bar, **arguments)
        finally:
            self.continued_phase = None
        # of a run that was at its end
        self.enter_loop(model)

    def enter_loop(self, model: Any) -> None:
        """
        The last moment before a loop goes on: whatever was set up since has left its trace in the random states.

        :param model: the model
        """
        point, self.point, self.continued_phase = self.point, None, None
        if point is not None:
            restore_callbacks(self.root_callback, point["callbacks"])
            set_random_states(point["random"])
            model.start_time = time.time_ns() - point["elapsed"]

    def setup_learn(
        self, model: Any, callback: MaybeCallback, tb_log_name: str, progress_bar: bool
    ) -> tuple[int, BaseCallback]:
        """
        In the place of SB3's ``_setup_learn``, which would begin anew: counters, action noise, environment.

        :param model: the model
        :param callback: callback(s)
        :param tb_log_name: name of the TensorBoard run
        :param progress_bar: show a progress bar
        :return: timesteps at which the call ends, the callbacks
        """
        model.start_time = time.time_ns()
        if not model._custom_logger:
            model._logger = configure_logger(model.verbose, model.tensorboard_log, tb_log_name, False)
        return model._total_timesteps, model._init_callback(callback, progress_bar)

    def init_callback(self, model: Any, callback: BaseCallback) -> BaseCallback:
        """
        :param model: the model
        :param callback: tree of callbacks of a call that begins
        :return: the same
        """
        if self.continued_phase is None:
            # a new run: the interrupted one is given up
            self.point = None
        self.root_callback = callback
        for each in callback_tree(callback):
            if isinstance(each, EveryNTimesteps):
                # SB3 leaves it waiting for a number of timesteps that was reached before counting began anew
                each.last_time_trigger = min(each.last_time_trigger, model.num_timesteps)
        return callback


def load_checkpoint(cls: type[Any], checkpoint: Checkpoint, env: Any, device: Any, **kwargs: Any) -> Any:
    """
    :param cls: class of the model
    :param checkpoint: an intact checkpoint
    :param env: environment, made and wrapped as the interrupted run's
    :param device: device to continue on
    :param kwargs: as for ``load``
    :return: the model
    :raises CheckpointError: if it is another class's, or ``env`` is made differently
    :raises ValueError: if ``buffer_size`` is given
    """
    if kwargs.get("buffer_size") is not None:
        raise ValueError("buffer_size: a run goes on with the buffer that it has; leave it out of load_latest().")
    ours, theirs = f"{cls.__module__}:{cls.__qualname__}", checkpoint.manifest["class"]
    if ours != theirs:
        raise CheckpointError(f"folder: {checkpoint.path} is a checkpoint of {theirs}, not of {ours}: use that class.")
    path: Any = checkpoint.file("model.zip")
    model: Any = cls.load(path, env=env, device=device, force_reset=False, **kwargs)
    _warn_of_differences(checkpoint.manifest["environment"], environment_facts(model))
    model.resumption.point = restore_run(model, checkpoint)
    model.resumption.last_checkpoint = str(checkpoint.path)
    return model


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
    :raises ValueError: if ``buffer_size`` is given: the run goes on with the buffer that it has
    """
    checkpoint = latest_checkpoint(folder)
    module, _, name = checkpoint.manifest["class"].partition(":")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"folder: the class {module}.{name} of {checkpoint.path} can't be imported; call load_latest of the class itself."
        ) from error
    if not (isinstance(cls, type) and hasattr(cls, "load_latest")):
        raise CheckpointError(f"folder: {checkpoint.path} was written by {module}.{name}, which is none of our algorithms.")
    return load_checkpoint(cls, checkpoint, env, device, **kwargs)


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
        model: Any = self.model
        if not hasattr(model, "resumption"):
            raise TypeError(f"ResumableCheckpointCallback: {type(self.model).__name__} can't resume; use CheckpointCallback.")
        if self.parent is not None:
            # such callbacks hand on steps only
            raise ValueError(f"ResumableCheckpointCallback: give it to learn() itself, not to {type(self.parent).__name__}.")
        checkpoints = list_checkpoints(self.folder)
        if checkpoints and self._run_of(checkpoints[-1]) != model.run.id:
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
        run = model.resumption
        self._saved_at = model.num_timesteps
        try:
            run.last_checkpoint = str(save_checkpoint(model, self.folder, self.keep))
        except OSError as error:
            last = "there is none yet" if run.last_checkpoint is None else f"the last one, {run.last_checkpoint}, is intact"
            warnings.warn(
                f"The checkpoint of step {model.num_timesteps} could not be written to {self.folder} ({error}); {last}. "
                f"Training goes on; the next attempt is in {self.save_freq} steps.",
                stacklevel=2,
            )
            return
        if self.verbose >= 1:
            print(f"Checkpoint of step {model.num_timesteps}: {run.last_checkpoint}")
