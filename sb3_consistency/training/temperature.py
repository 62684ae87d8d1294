"""The temperature of a policy that is learned online."""

import math
from typing import Any

import torch as th
from stable_baselines3.common.utils import update_learning_rate

from sb3_consistency.generative.exploration import ExplorationOptions
from sb3_consistency.options import check_range, option
from sb3_consistency.values.losses import temperature_gradient

#: learning rate of a transport's temperature, in units of the critics'; with 1, as SAC has it and a Gaussian policy, it is
#: still high when they know the values
TRANSPORT_RATE = 3.0


def _check_ent_coef(name: str, value: Any) -> None:
    if not isinstance(value, str):
        check_range(name, value, 0)
        return
    kind, _, start = value.partition("_")
    try:
        known = kind == "auto" and (value == "auto" or 0 < float(start) < math.inf)
    except ValueError:
        known = False
    if not known:
        raise ValueError(f'{name} must be "auto", "auto_0.1" (learned from there) or a number of at least 0, got {value!r}.')


def _check_target_entropy(name: str, value: Any) -> None:
    if value != "auto":
        check_range(name, value, -math.inf, math.inf, open_low=True)


class TemperatureOptions(ExplorationOptions):
    """What an algorithm with a temperature can be told, with SAC's names."""

    exploration: str = "gaussian"
    ent_coef: str | float = option(
        default="auto",
        check=_check_ent_coef,
        fixed=True,
        before=0.0,
        doc='online from scratch, the temperature: weight of the entropy, or of the transport cost, against Q. "auto" is '
        'learned, so that the entropy stays near ``target_entropy``, "auto_0.1" from there on ("auto" begins at 1); 0 learns '
        "the offline phase's kind of policy, which explores by ``action_noise`` and ``n_candidates`` only, after one, too",
        search={"online": ["auto", "auto_0.1", 0.05]},
    )
    target_entropy: str | float = option(
        default="auto",
        check=_check_target_entropy,
        before="auto",
        doc="entropy that a learned temperature aims at (of a transport, before tanh), and that of the noise that is added "
        'after an offline phase; "auto" for -1 per action dimension, of a chunk for each of its actions: a deviation of 0.09',
    )
    shift_cost: float = option(
        default=1.0,
        low=0,
        before=1.0,
        doc="of a transport: price of moving all noise of a state alike, where moving it apart has 1: with 1 it keeps several "
        "ways of doing a task, and is pulled to the middle of the actions; with 0 it isn't, and takes one",
        search={"online": [0.0, 0.5, 1.0]},
    )


class Temperature:
    """
    A temperature, learned or fixed.

    :param ent_coef: as :class:`TemperatureOptions` says
    :param learning_rate: that of the critics
    :param rate: its own, in units of that
    :param device: where to
    """

    def __init__(self, ent_coef: str | float, learning_rate: float, rate: float, device: th.device) -> None:
        self.rate = rate
        #: logarithm of a learned one, (1,)
        self.log: th.Tensor | None = None
        self.optimizer: th.optim.Optimizer | None = None
        start = float(ent_coef.partition("_")[2] or 1) if isinstance(ent_coef, str) else float(ent_coef)
        self._fixed = th.full((), start, device=device)
        if isinstance(ent_coef, str):
            self.log = self._fixed.log().reshape(1).requires_grad_()
            self.optimizer = th.optim.Adam([self.log], lr=rate * learning_rate)

    def value(self) -> th.Tensor:
        """
        :return: the temperature at present, scalar
        """
        return self._fixed if self.log is None else self.log.detach().exp().squeeze()

    def set_learning_rate(self, rate: float) -> None:
        """
        :param rate: learning rate of the critics from now on
        """
        if self.optimizer is not None:
            update_learning_rate(self.optimizer, self.rate * rate)

    def step(self, entropy: th.Tensor, target: float) -> None:
        """
        Move a learned temperature: up where the entropy is below its target, down where it is above.

        :param entropy: of the policy in the states of the batch, mean, scalar
        :param target: what it should be
        """
        if self.log is not None and self.optimizer is not None:
            self.log.grad = temperature_gradient(entropy, target).reshape(1)
            self.optimizer.step()
