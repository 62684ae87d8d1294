"""From losses to steps of the networks: gradients, optimizers, moving averages."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch as th
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.utils import get_parameters_by_name

from sb3_consistency.policies.modules import Network
from sb3_consistency.policies.policy import NetworksPolicy
from sb3_consistency.training.gradient import LossGradient

#: batch -> loss (scalar), scalars to log
LossFn = Callable[[Any], tuple[th.Tensor, TensorDict]]


class DivergenceError(FloatingPointError, ValueError):
    """A loss or its gradient became infinite or NaN. (A ValueError, too: rl-zoo3 prunes a trial that raises one.)"""


class UpdateOptions(Protocol):
    """What an updater is told, looked at in every step."""

    max_grad_norm: float | None
    compile: bool
    precision: str
    on_divergence: str


class Updater:
    """
    Descends losses, and lets moving averages follow.

    A network whose loss or gradient is not finite keeps its weights, and so do its moving averages.

    :param policy: owner of the networks
    :param options: what it is told
    """

    def __init__(self, policy: NetworksPolicy, options: UpdateOptions) -> None:
        self.policy, self.options = policy, options
        self._gradients: dict[str, LossGradient] = {}
        self._unchecked: list[TensorDict] = []
        networks = [getattr(policy, name) for name in policy.trained_networks()]
        self._batch_norm_statistics = [x for network in networks for x in get_parameters_by_name(network, ["running_"])]
        self._batch_norm_pairs = {
            target: tuple(get_parameters_by_name(getattr(policy, x), ["running_"]) for x in (name, target))
            for name, network in policy.structure.items()
            for target in network.targets
        }

    def __getstate__(self) -> dict[str, Any]:
        # for copies and pickles: compiled functions belong to these very weights
        return {**vars(self), "_gradients": {}}

    def forget(self) -> None:
        """Make all gradients anew: an option that compiled functions take for a constant has changed."""
        self._gradients = {}

    def step(self, losses: Mapping[str, LossFn], networks: Mapping[str, Network], batch: Any, n_updates: int) -> TensorDict:
        """
        :param losses: name of a network -> its loss, in the order of the updates
        :param networks: name of a network -> its declaration, with the rules of its moving averages
        :param batch: what the losses take
        :param n_updates: number of updates, this one included
        :return: scalars to log
        """
        metrics: TensorDict = {}
        finite: TensorDict = {}
        for name, loss_fn in losses.items():
            statistics = [x.clone() for x in self._batch_norm_statistics]
            loss_gradient = self._loss_gradient(name, loss_fn)
            loss, info, gradients = loss_gradient(batch)
            finite[name] = self._descend(name, loss, loss_gradient.parameters, gradients)
            for new, old in zip(self._batch_norm_statistics, statistics, strict=True):
                new.copy_(th.where(finite[name], new, old))
            metrics |= {f"{name}_loss": loss, **info}
        with th.no_grad():
            for name, network in networks.items():
                for target, rule in network.targets.items():
                    assert rule is not None
                    self._follow(name, target, rule.weight(n_updates), finite.get(name))
        self._unchecked.append(finite)
        return metrics

    def _loss_gradient(self, name: str, loss_fn: LossFn) -> LossGradient:
        """What the optimizer holds now: as with SB3, layers may be replaced together with their optimizer."""
        parameters = [p for group in getattr(self.policy, name).optimizer.param_groups for p in group["params"]]
        known = self._gradients.get(name)
        if known is None or list(map(id, known.parameters)) != list(map(id, parameters)):
            self._gradients[name] = LossGradient(loss_fn, parameters, self.options.precision, self.options.compile)
        return self._gradients[name]

    def _descend(
        self, name: str, loss: th.Tensor, parameters: Sequence[th.Tensor], gradients: Sequence[th.Tensor | None]
    ) -> th.Tensor:
        """Take a step of the optimizer, unless loss or gradient is not finite; whether they are, scalar."""
        optimizer = getattr(self.policy, name).optimizer
        norm = th.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self.options.max_grad_norm is not None:
            # not in place: two parameters may share one gradient
            scale = (self.options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = [None if g is None else scale * g for g in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        # a gradient that is not finite makes the norm so
        finite = (norm + loss).isfinite()
        if self.reads_tensors(loss.device, optimizer):
            if finite:
                optimizer.step()
        else:
            optimizer.found_inf = 1.0 - finite.float()
            optimizer.step()
        return finite

    @staticmethod
    def reads_tensors(device: th.device, optimizer: th.optim.Optimizer) -> bool:
        """
        Reading a tensor costs nothing on a CPU; elsewhere the fused optimizers look themselves, the others can't.

        :param device: where the networks are
        :param optimizer: an optimizer
        :return: whether the host looks before the optimizer's step
        """
        return device.type == "cpu" or not optimizer.defaults.get("fused")

    def _follow(self, name: str, target: str, weight: float, finite: th.Tensor | None) -> None:
        on_cpu = finite is not None and finite.device.type == "cpu"
        if weight == 0 or (on_cpu and not finite):
            return
        targets: list[th.Tensor] = list(getattr(self.policy, target).parameters())
        sources: list[th.Tensor] = list(getattr(self.policy, name).parameters())
        if finite is None or on_cpu:
            th._foreach_lerp_(targets, sources, weight)
        else:
            lerp_where(targets, sources, weight, finite)
        for new, old in zip(*self._batch_norm_pairs[target], strict=True):
            old.data.copy_(new if finite is None else th.where(finite, new, old))

    def check(self, n_updates: int, hint: str = "") -> None:
        """
        Look at all steps since the last look; between two looks the host waits for none of them.

        :param n_updates: number of updates so far
        :param hint: end of the message
        :raises DivergenceError: if a loss or gradient was not finite, and ``on_divergence`` is "stop"
        """
        steps, self._unchecked = self._unchecked, []
        if not steps or bool(th.stack([flag for step in steps for flag in step.values()]).all()):
            return
        failed = [(i, name) for i, step in enumerate(steps) for name, flag in step.items() if not flag]
        first, name = failed[0]
        message = (
            f"The {name} loss or its gradient was not finite at gradient step {n_updates - len(steps) + first + 1}"
            f"{f' and {len(failed) - 1} times more since' if len(failed) > 1 else ''}. These steps were left out: weights, "
            "moving averages and optimizers are as before them. Look for infinite rewards, a learning rate that is too high, "
            f"or set max_grad_norm.{hint}"
        )
        if self.options.on_divergence == "stop":
            raise DivergenceError(f"{message} To go on all the same, pass on_divergence='continue'.")
        warnings.warn(message, stacklevel=2)


class RunningMeans:
    """
    Means of scalars by name, summed in place.

    A tensor kept for every step would lie between the large ones of two steps and keep the allocator from using their
    memory again: a run swung by 400 MB (docs/reliability.md).
    """

    def __init__(self) -> None:
        self._sums: TensorDict = {}
        self._counts: dict[str, int] = {}

    def add(self, values: TensorDict) -> None:
        """
        :param values: scalars of one step, by name
        """
        for name, value in values.items():
            if name in self._sums:
                self._sums[name] += value
                self._counts[name] += 1
            else:
                self._sums[name], self._counts[name] = value.clone(), 1

    def read(self) -> dict[str, float]:
        """
        Waits for the device: to be read once, when all steps are under way.

        :return: the means so far
        """
        if not self._sums:
            return {}
        means = th.stack([total / self._counts[name] for name, total in self._sums.items()]).tolist()
        return dict(zip(self._sums, means, strict=True))


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
