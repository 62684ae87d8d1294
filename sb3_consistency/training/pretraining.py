"""Offline pretraining for SB3's off-policy algorithms: gradient steps on a dataset, with SB3's callbacks and logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, TensorDict
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm.auto import tqdm

from sb3_consistency.data.checks import as_count
from sb3_consistency.data.episodes import DatasetError, map_observations
from sb3_consistency.envs.wrappers import SpacesOnlyEnv
from sb3_consistency.training.means import RunningMeans
from sb3_consistency.training.offline_data import DatasetMixin

if TYPE_CHECKING:
    from typing import Self

# batches sampled from the replay buffer at once
CHUNK = 64
# rows of the held-out data that are evaluated, evenly spread
HELDOUT_ROWS = 8192


class OfflinePretrainingMixin(DatasetMixin):
    """
    Adds :meth:`pretrain` to an off-policy algorithm that can load datasets.

    The algorithm supplies ``_batches``, ``_gradient_step(batch) -> metrics``, ``_update_learning_rates``, ``_log_metrics``
    and ``_check_divergence``.
    """

    # name and arguments of the latest call of learn() or pretrain(): what a resumed run continues
    _call: tuple[str, dict[str, Any]] | None = None
    # phase ("offline", "online") of that call that is about to be continued, if one is
    _continued_phase: str | None = None
    _counts_before_pretraining = (0, 0)

    def pretrain(
        self,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str | None = None,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train on the loaded dataset without touching an environment.

        SB3 callbacks work as in :meth:`learn`: ``on_step`` is called once per gradient step, ``on_rollout_start`` and
        ``on_rollout_end`` around every chunk of 64, whose batches are drawn together. Inside,
        ``num_timesteps`` counts the model's gradient steps, so that checkpoints and TensorBoard points get
        names of their own; it is restored at the end.

        :param gradient_steps: number of gradient steps
        :param callback: callback(s), called after every gradient step
        :param log_interval: gradient steps between two logs; None to leave them to a callback, as SB3 does
        :param tb_log_name: name of the TensorBoard run; None for the class's name + "_pretrain"
        :param progress_bar: show a progress bar
        :return: the model
        :raises DatasetError: if no dataset was loaded
        :raises TypeError: if the number of steps is not whole
        :raises ValueError: if it is negative
        """
        gradient_steps = as_count("gradient_steps", gradient_steps)
        arguments = {"gradient_steps": gradient_steps, "log_interval": log_interval, "tb_log_name": tb_log_name}
        self._call = ("pretrain", arguments)
        self._pretrain(gradient_steps, callback, log_interval, tb_log_name, progress_bar)
        return self

    def _pretrain(
        self,
        gradient_steps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str | None,
        progress_bar: bool,
    ) -> bool:
        self._load_constructor_dataset()
        if self._continued_phase is None:
            self._counts_before_pretraining = self._total_timesteps, self._num_timesteps_at_start
            # saved with checkpoints: a model loaded from one knows its environment steps again
            self._online_timesteps = self.num_timesteps
            self.num_timesteps = self._n_updates
        name = tb_log_name or f"{type(self).__name__}_pretrain"
        try:
            return self._learn_offline(gradient_steps, callback, log_interval, name, self._n_updates == 0, progress_bar)
        finally:
            self._total_timesteps, self._num_timesteps_at_start = self._counts_before_pretraining
            self._restore_online_timesteps()
            self._current_progress_remaining = 1.0

    @property
    def is_pretrained(self) -> bool:
        """Whether ``learn()`` has none of the constructor's ``pretrain_steps`` left to take."""
        return self._pretraining_left() <= 0

    def _pretraining_left(self) -> int:
        return (self._pretrain_start or 0) + self.pretrain_steps - self._n_updates if self.pretrain_steps else 0

    def _restore_online_timesteps(self) -> None:
        if self._online_timesteps is not None:
            self.num_timesteps, self._online_timesteps = self._online_timesteps, None

    def get_env(self) -> VecEnv | None:
        """
        :return: the environment; without one, in an offline phase, a stand-in with its spaces, which callbacks ask for
        """
        if self.env is None and self._in_offline_phase:
            return DummyVecEnv([lambda: SpacesOnlyEnv(self.observation_space, self.action_space)])
        return super().get_env()

    def _learn_offline(
        self,
        gradient_steps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        new_tb_run: bool,
        progress_bar: bool,
    ) -> bool:
        """Take gradient steps on the offline data; one step counts as one timestep. False if a callback stopped it."""
        if self._offline_data() is None:
            raise DatasetError(
                "No offline data: call load_dataset(...) first, or pass dataset=... to the constructor (a Minari id such as "
                "'mujoco/hopper/medium-v0', arrays, or a replay buffer)."
            )
        self.start_time = time.time_ns()
        if self._continued_phase is None:
            self._num_timesteps_at_start = self.num_timesteps
            self._total_timesteps = self.num_timesteps + gradient_steps
            if self._curriculum_end is None and gradient_steps > 0:
                self._curriculum_end = self._n_updates + gradient_steps
        done, total = (n - self._num_timesteps_at_start for n in (self.num_timesteps, self._total_timesteps))
        if not self._custom_logger:
            new_tb_run = new_tb_run and self._continued_phase is None
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, new_tb_run)
        self._was_pretrained = self._in_offline_phase = True
        if self.ep_info_buffer is None:  # SB3's logs read it
            self.ep_info_buffer, self.ep_success_buffer = (deque(maxlen=self._stats_window_size) for _ in range(2))
        try:
            callback = self._init_callback(callback)
            callback.on_training_start({"self": self, "total_timesteps": self._total_timesteps}, globals())
            with tqdm(initial=done, total=total, desc="Pretraining", unit="step", disable=not progress_bar) as bar:
                completed = self._offline_steps(callback, log_interval, bar)
            callback.on_training_end()
        finally:
            self._in_offline_phase = False
        return completed

    def _offline_steps(self, callback: BaseCallback, log_interval: int | None, bar: Any) -> bool:
        means = RunningMeans()
        first, end = self._num_timesteps_at_start, self._total_timesteps
        # SB3 counts the progress of a continued learn() from the first of its timesteps; pretrain() counts its own steps
        origin = first if self._online_timesteps is not None else 0
        # callbacks that watch environments see that nothing happens there
        still = {"rewards": np.zeros(self.n_envs), "dones": np.zeros(self.n_envs, bool), "infos": [{}] * self.n_envs}
        while self.num_timesteps < end:
            self._check_divergence()
            callback.on_rollout_start()
            self._current_progress_remaining = 1.0 - (self.num_timesteps - origin) / (end - origin)
            self._update_learning_rates()
            for batch in self._batches(min(CHUNK, end - self.num_timesteps), self.batch_size):
                means.add(self._gradient_step(batch))
                self.num_timesteps += 1
                bar.update()
                n_steps = self.num_timesteps - first
                if log_interval is not None and (n_steps % log_interval == 0 or self.num_timesteps == end):
                    self._dump_offline_logs(means)
                    means = RunningMeans()
                callback.update_locals({"self": self, "batch": batch, **still})
                if not callback.on_step():
                    return False
            if log_interval is None:
                # a callback may write what is recorded; the end of the last chunk is looked at, too
                self._log_metrics(means)
                means = RunningMeans()
            callback.on_rollout_end()
        return True

    def _dump_offline_logs(self, means: RunningMeans) -> None:
        self._log_metrics(means)
        if self._heldout is not None:
            self.logger.record("eval/heldout_bc_loss", self.heldout_loss(self._heldout))
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        self.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    @th.no_grad()
    def heldout_loss(self, heldout: dict[str, Any]) -> float:
        """
        :param heldout: observations and scaled actions of the held-out episodes
        :return: their behaviour-cloning loss at the end of the curriculum, with the same noise at every call
        """
        self.policy.set_training_mode(False)
        rows = np.linspace(0, len(heldout["actions"]) - 1, min(HELDOUT_ROWS, len(heldout["actions"]))).astype(int)
        taken = map_observations(lambda x: x[rows], heldout["observations"])
        if self._vec_normalize_env is not None:
            taken = self._vec_normalize_env.normalize_obs(taken)
        obs, _ = self.policy.obs_to_tensor(taken)
        actions = th.as_tensor(heldout["actions"][rows], device=self.device)
        generator = th.Generator().manual_seed(0)
        model = self.policy.actor.model
        noise = th.randn(actions.shape, generator=generator).to(self.device)
        u = th.rand(len(actions), model.n_uniforms, generator=generator).to(self.device)
        return float(model.loss(actions, self.policy.actor.features(obs), noise=noise, u=u).mean())

    # supplied by the algorithm
    def _batches(self, n_batches: int, batch_size: int) -> Iterator[Any]:
        raise NotImplementedError

    def _gradient_step(self, batch: Any) -> TensorDict:
        raise NotImplementedError

    def _update_learning_rates(self) -> None:
        raise NotImplementedError

    def _log_metrics(self, means: RunningMeans) -> None:
        raise NotImplementedError

    def _check_divergence(self) -> None:
        raise NotImplementedError
