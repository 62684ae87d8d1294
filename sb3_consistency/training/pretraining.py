"""The offline phase: gradient steps on a dataset, with SB3's callbacks and logs."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger

from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.training.batches import CHUNK
from sb3_consistency.training.updater import RunningMeans


def pretrain(
    model: Any,
    gradient_steps: int,
    callback: MaybeCallback,
    log_interval: int | None,
    tb_log_name: str | None,
    progress_bar: bool,
) -> bool:
    """
    An offline phase of a model that may go online: inside, ``num_timesteps`` counts gradient steps.

    :param model: the algorithm
    :param gradient_steps: number of gradient steps
    :param callback: callback(s), called after every gradient step
    :param log_interval: gradient steps between two logs; None to leave them to a callback
    :param tb_log_name: name of the TensorBoard run; None for the class's name + "_pretrain"
    :param progress_bar: show a progress bar
    :return: False if a callback stopped it
    """
    run = model.run
    model.data.load_of_constructor()
    if model.continued_phase is None:
        run.counts_before_pretraining = (model._total_timesteps, model._num_timesteps_at_start)
        # saved with checkpoints: a model loaded from one knows its environment steps again
        run.online_timesteps = model.num_timesteps
        model.num_timesteps = model._n_updates
    name = tb_log_name or f"{type(model).__name__}_pretrain"
    try:
        return learn_offline(model, gradient_steps, callback, log_interval, name, model._n_updates == 0, progress_bar)
    finally:
        model._total_timesteps, model._num_timesteps_at_start = run.counts_before_pretraining
        model.restore_online_timesteps()
        model._current_progress_remaining = 1.0


def learn_offline(
    model: Any,
    gradient_steps: int,
    callback: MaybeCallback,
    log_interval: int | None,
    tb_log_name: str,
    new_tb_run: bool,
    progress_bar: bool,
) -> bool:
    """
    Take gradient steps on the offline data; one step counts as one timestep.

    :param model: the algorithm
    :param gradient_steps: number of gradient steps
    :param callback: callback(s), called after every gradient step
    :param log_interval: gradient steps between two logs; None to leave them to a callback
    :param tb_log_name: name of the TensorBoard run
    :param new_tb_run: whether it is a new one
    :param progress_bar: show a progress bar
    :return: False if a callback stopped it
    :raises DatasetError: if there is no offline data
    """
    if model.data.buffer is None:
        raise DatasetError(
            "No offline data: call load_dataset(...) first, or pass dataset=... to the constructor (a Minari id such as "
            "'mujoco/hopper/medium-v0', arrays, or a replay buffer)."
        )
    model.start_time = time.time_ns()
    if model.continued_phase is None:
        model._num_timesteps_at_start = model.num_timesteps
        model._total_timesteps = model.num_timesteps + gradient_steps
        if model.run.curriculum_end is None and gradient_steps > 0:
            model.run.curriculum_end = model._n_updates + gradient_steps
    if not model._custom_logger:
        new_tb_run = new_tb_run and model.continued_phase is None
        model._logger = configure_logger(model.verbose, model.tensorboard_log, tb_log_name, new_tb_run)
    model.run.was_pretrained = model.in_offline_phase = True
    model.run.in_vec_normalize |= model._vec_normalize_env is not None and model._vec_normalize_env.norm_obs
    if model.ep_info_buffer is None:  # SB3's logs read it
        model.ep_info_buffer, model.ep_success_buffer = (deque(maxlen=model._stats_window_size) for _ in range(2))
    try:
        callbacks: BaseCallback = model._init_callback(callback, progress_bar)
        callbacks.on_training_start({"self": model, "total_timesteps": model._total_timesteps}, globals())
        completed = _steps(model, callbacks, log_interval)
        callbacks.on_training_end()
    finally:
        model.in_offline_phase = False
    return completed


def _steps(model: Any, callback: BaseCallback, log_interval: int | None) -> bool:
    model.enter_loop()
    means = RunningMeans()
    first, end = model._num_timesteps_at_start, model._total_timesteps
    # SB3 counts the progress of a continued learn() from the first of its timesteps; pretrain() counts its own steps
    origin = first if model.run.online_timesteps is not None else 0
    # callbacks that watch environments see that nothing happens there
    still = {"rewards": np.zeros(model.n_envs), "dones": np.zeros(model.n_envs, bool), "infos": [{}] * model.n_envs}
    while model.num_timesteps < end:
        model.check_divergence()
        callback.on_rollout_start()
        model._current_progress_remaining = 1.0 - (model.num_timesteps - origin) / (end - origin)
        model.update_learning_rates()
        for batch in model.batches(min(CHUNK, end - model.num_timesteps), model.batch_size):
            means.add(model.gradient_step(batch))
            model.num_timesteps += 1
            n_steps = model.num_timesteps - first
            if log_interval is not None and (n_steps % log_interval == 0 or model.num_timesteps == end):
                _dump_logs(model, means)
                means = RunningMeans()
            callback.update_locals({"self": model, "batch": batch, **still})
            if not callback.on_step():
                return False
        if log_interval is None:
            # a callback may write what is recorded; the end of the last chunk is looked at, too
            model.log_metrics(means)
            means = RunningMeans()
        callback.on_rollout_end()
    return True


def _dump_logs(model: Any, means: RunningMeans) -> None:
    model.log_metrics(means)
    if model.data.heldout is not None:
        model.logger.record("eval/heldout_bc_loss", model.data.heldout_loss())
    elapsed = max((time.time_ns() - model.start_time) / 1e9, 1e-9)
    model.logger.record("time/fps", int((model.num_timesteps - model._num_timesteps_at_start) / elapsed))
    model.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
    model.logger.record("time/total_timesteps", model.num_timesteps, exclude="tensorboard")
    model.logger.dump(step=model.num_timesteps)
