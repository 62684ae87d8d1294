"""The only training loop: batches, gradient steps, learning rates, target networks."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import Schedule, TensorDict
from stable_baselines3.common.utils import get_parameters_by_name, update_learning_rate

from sb3_consistency.policies.policy import GenerativePolicy
from sb3_consistency.training.batches import (
    Batch,
    bytes_per_transition,
    can_sample,
    concatenate,
    sample,
    samples_as_sb3,
    split,
)
from sb3_consistency.training.gradient import LossGradient
from sb3_consistency.training.means import RunningMeans
from sb3_consistency.training.pretraining import CHUNK, OfflinePretrainingMixin

# at most this much memory goes into batches that are sampled together
CHUNK_BYTES = 2**26

LossFn = Callable[[Batch], tuple[th.Tensor, TensorDict]]


class DivergenceError(FloatingPointError, ValueError):
    """A loss or its gradient became infinite or NaN. (A ValueError, too: rl-zoo3 prunes a trial that raises one.)"""


class TrainingLoop(OfflinePretrainingMixin):
    """Descends the losses that an algorithm names in :meth:`losses`, on batches of offline and online data."""

    policy: GenerativePolicy
    actor_lr_schedule: Schedule | None
    actor_learning_rate: float | Schedule | None
    cosine_lr_decay: bool | None
    max_grad_norm: float | None
    target_update_interval: int
    offline_fraction: float | Schedule | None
    compile: bool = False
    precision: str = "float32"
    on_divergence: str = "stop"
    #: path of the newest checkpoint, for the message of a :class:`DivergenceError`
    last_checkpoint: str | None = None
    #: share of the curriculum that is done, scalar in [0, 1]; None stands for its end
    progress: th.Tensor | None = None

    def losses(self) -> dict[str, LossFn]:
        """
        :return: name of a trained network -> its loss on a batch, with scalars to log; in the order of the updates
        """
        raise NotImplementedError

    def _collect_parameters(self) -> None:
        """Look up once what every gradient step goes through."""
        self._loss_gradients: dict[str, LossGradient] = {}
        self._unchecked_steps: list[TensorDict] = []
        networks = [getattr(self.policy, name) for name in self.policy.trained_networks()]
        self._batch_norm_statistics = [x for network in networks for x in get_parameters_by_name(network, ["running_"])]
        self._batch_norm_pairs = [
            (get_parameters_by_name(source, ["running_"]), get_parameters_by_name(target, ["running_"]))
            for source, target in self.policy.target_pairs()
        ]

    def _update_learning_rates(self) -> None:
        progress = self._current_progress_remaining
        decay = self._cosine_decay(1 - progress)
        rate, actor_rate = decay * self.lr_schedule(progress), decay * self._actor_rate(progress)
        for name in self.policy.trained_networks():
            update_learning_rate(getattr(self.policy, name).optimizer, actor_rate if name == "actor" else rate)
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/actor_learning_rate", actor_rate)

    def _actor_rate(self, progress: float) -> float:
        return (self.actor_lr_schedule or self.lr_schedule)(progress)

    def _cosine_decay(self, progress: float) -> float:
        decays = self._in_offline_phase if self.cosine_lr_decay is None else self.cosine_lr_decay
        return 0.5 * (1 + math.cos(math.pi * progress)) if decays else 1.0

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        if not self._ready_to_train():
            return
        self._update_learning_rates()
        means = RunningMeans()
        for batch in self._batches(gradient_steps, batch_size):
            means.add(self._gradient_step(batch))
        self._log_metrics(means)

    def _ready_to_train(self) -> bool:
        """After an offline phase whose data is gone (it is not saved with a model), experience must gather first."""
        if self._offline_data() is not None or not self._was_pretrained or self.replay_buffer is None:
            return can_sample(self.replay_buffer) or can_sample(self.offline_buffer)
        wanted = min(self.__dict__["learning_starts"] // self.n_envs, self.replay_buffer.buffer_size)
        return can_sample(self.replay_buffer) and self.replay_buffer.size() >= wanted

    def _gradient_step(self, batch: Batch) -> TensorDict:
        # predict() of the policy, or of a network alone, switches it off
        self.policy.set_training_mode(True)
        self._update_step_numbers()
        metrics: TensorDict = {}
        finite: TensorDict = {}
        for name, loss_fn in self.losses().items():
            statistics = [x.clone() for x in self._batch_norm_statistics]
            loss_gradient = self._loss_gradient(name, loss_fn)
            loss, info, gradients = loss_gradient(batch)
            finite[name] = self._descend(name, loss, loss_gradient.parameters, gradients)
            for new, old in zip(self._batch_norm_statistics, statistics, strict=True):
                new.copy_(th.where(finite[name], new, old))
            metrics |= {f"{name}_loss": loss, **info}
        self._n_updates += 1
        with th.no_grad():
            self._update_targets(finite)
        self._unchecked_steps.append(finite)
        return metrics

    def _loss_gradient(self, name: str, loss_fn: LossFn) -> LossGradient:
        """What the optimizer holds now: as with SB3, layers may be replaced together with their optimizer."""
        parameters = [p for group in getattr(self.policy, name).optimizer.param_groups for p in group["params"]]
        known = self._loss_gradients.get(name)
        if known is None or list(map(id, known.parameters)) != list(map(id, parameters)):
            self._loss_gradients[name] = LossGradient(loss_fn, parameters, self.precision, self.compile)
        return self._loss_gradients[name]

    def _descend(
        self, name: str, loss: th.Tensor, parameters: Sequence[th.Tensor], gradients: Sequence[th.Tensor | None]
    ) -> th.Tensor:
        """Take a step of the optimizer, unless loss or gradient is not finite; whether they are, scalar."""
        optimizer = getattr(self.policy, name).optimizer
        norm = th.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self.max_grad_norm is not None:
            # not in place: two parameters may share one gradient
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [None if g is None else scale * g for g in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        # a gradient that is not finite makes the norm so
        finite = (norm + loss).isfinite()
        if self._may_read_tensors(optimizer):
            if finite:
                optimizer.step()
        else:
            optimizer.found_inf = 1.0 - finite.float()
            optimizer.step()
        return finite

    def _may_read_tensors(self, optimizer: th.optim.Optimizer) -> bool:
        """Reading a tensor costs nothing on a CPU; elsewhere the fused optimizers look themselves, the others can't."""
        return self.device.type == "cpu" or not optimizer.defaults.get("fused")

    def target_weights(self) -> list[float]:
        """
        :return: for every pair of :meth:`GenerativePolicy.target_pairs`, the weight with which the target moves
            towards its network after this gradient step; 0 to leave it
        """
        due = self._n_updates % self.target_update_interval == 0
        return [self.tau if due else 0.0] if self.policy.use_critic else []

    def _update_targets(self, finite: TensorDict) -> None:
        pairs = zip(self.policy.target_pairs(), self.target_weights(), self._batch_norm_pairs, strict=True)
        moved = {getattr(self.policy, name): flag for name, flag in finite.items()}
        for (source, target), weight, (statistics, target_statistics) in pairs:
            flag = moved.get(source)
            if weight == 0 or (flag is not None and flag.device.type == "cpu" and not flag):
                continue
            targets: list[th.Tensor] = list(target.parameters())
            sources: list[th.Tensor] = list(source.parameters())
            if flag is None or flag.device.type == "cpu":
                th._foreach_lerp_(targets, sources, weight)
            else:
                lerp_where(targets, sources, weight, flag)
            for new, old in zip(statistics, target_statistics, strict=True):
                old.data.copy_(new if flag is None else th.where(flag, new, old))

    def _batches(self, n_batches: int, batch_size: int) -> Iterator[Batch]:
        """Sample several batches at once: the buffer's fixed cost per call is larger than its cost per row."""
        at_once = min(n_batches, CHUNK)
        if at_once > 1:
            buffers = [buffer for buffer in (self.replay_buffer, self.offline_buffer) if buffer is not None]
            at_once = min(at_once, max(1, CHUNK_BYTES // (batch_size * bytes_per_transition(self.observation_space))))
            # a user's own may give meaning to the size of what is drawn together
            at_once = at_once if all(map(samples_as_sb3, buffers)) else 1
        for start in range(0, n_batches, at_once):
            yield from self._sample_batches(min(at_once, n_batches - start), batch_size)

    def _sample_batches(self, n_batches: int, batch_size: int) -> list[Batch]:
        n_offline = self._offline_share(batch_size)
        parts = []
        for buffer, size in ((self.replay_buffer, batch_size - n_offline), (self.offline_buffer, n_offline)):
            if size > 0 and buffer is not None:
                segments = self._segments if buffer is self._offline_data() else None
                data = sample(buffer, n_batches * size, self.gamma, self._vec_normalize_env, segments)
                parts.append(split(data, n_batches))
        return parts[0] if len(parts) == 1 else concatenate(*parts)

    def _offline_share(self, batch_size: int) -> int:
        """How many rows of a batch come from the separate offline buffer."""
        if not can_sample(self.offline_buffer):
            return 0
        if not can_sample(self.replay_buffer):
            return batch_size
        assert self.offline_buffer is not None and self.replay_buffer is not None
        if self.offline_fraction is None:
            n_offline, n_online = self.offline_buffer.size(), self.replay_buffer.size()
            # drawn, not rounded: a few online transitions among many offline ones must get their turn
            return int(np.random.binomial(batch_size, n_offline / (n_offline + n_online)))
        fraction = self.offline_fraction
        share = fraction(self._current_progress_remaining) if callable(fraction) else fraction
        return round(batch_size * min(max(share, 0.0), 1.0))

    def _update_step_numbers(self) -> None:
        """Set what changes from step to step, as tensors."""
        end = self.curriculum_steps or self._curriculum_end
        if end:
            share = min(1.0, self._n_updates / end)
            self.progress = th.full((), share, device=self.device)

    def _check_divergence(self) -> None:
        """Look at all steps since the last look: the only place where the host waits for them."""
        steps, self._unchecked_steps = self._unchecked_steps, []
        if not steps or bool(th.stack([flag for step in steps for flag in step.values()]).all()):
            return
        failed = [(i, name) for i, step in enumerate(steps) for name, flag in step.items() if not flag]
        first, name = failed[0]
        number = self._n_updates - len(steps) + first + 1
        message = (
            f"The {name} loss or its gradient was not finite at gradient step {number}"
            f"{f' and {len(failed) - 1} times more since' if len(failed) > 1 else ''}. These steps were left out: weights, "
            "moving averages and optimizers are as before them. Look for infinite rewards, a learning rate that is too high, "
            f"or set max_grad_norm.{self._last_checkpoint_hint()}"
        )
        if self.on_divergence == "stop":
            raise DivergenceError(f"{message} To go on all the same, pass on_divergence='continue'.")
        warnings.warn(message, stacklevel=2)

    def _last_checkpoint_hint(self) -> str:
        return f" The last checkpoint is {self.last_checkpoint}." if self.last_checkpoint else ""

    def _log_metrics(self, means: RunningMeans) -> None:
        self._check_divergence()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, mean in means.read().items():
            self.logger.record(f"train/{name}", mean)


def lerp_where(targets: list[th.Tensor], sources: list[th.Tensor], weight: float, flag: th.Tensor) -> None:
    """
    Move targets towards sources, or not at all, without asking which of it.

    :param targets: tensors to move in place
    :param sources: tensors to move towards
    :param weight: share of the way
    :param flag: boolean scalar, whether to move
    """
    # lerp_ takes the weight as a number only
    steps = th._foreach_sub(sources, targets)
    th._foreach_mul_(steps, weight * flag)
    th._foreach_add_(targets, steps)
