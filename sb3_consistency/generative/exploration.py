"""Consistency policies that explore: what they are online, from scratch and after an offline phase."""

import math
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_consistency.generative.consistency import ConsistencyModel
from sb3_consistency.generative.model import clamp_action
from sb3_consistency.generative.networks import in_float32, mlp_layers
from sb3_consistency.options import Options, option

#: entropy of standard normal noise
UNIT_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
#: what the mean of log |x - x'| lacks to the entropy, for a Gaussian number: Euler's constant / 2 more
GAUSSIAN_ENTROPY = UNIT_ENTROPY + 0.5 * 0.5772156649
SMALLEST_DISTANCE = 1e-3
EXPLORATIONS = ("gaussian", "transport", "none")
FORMS = ("plain", "added", "squashed", "transport")
#: limits of the logarithm of the standard deviation, SAC's
LOG_STD_LIMITS = (-20.0, 2.0)
LOG_STD_WIDTH = 64
#: of z in a squashed policy: small, so that it begins as SAC's does
SQUASHED_NOISE_SCALE = 0.1


def pair_entropy(samples: th.Tensor, others: th.Tensor) -> th.Tensor:
    """
    How far two independent samples of one distribution lie apart, as an entropy: the mean logarithm of their distance, plus
    the constant that makes it the entropy of a Gaussian. Dimensions are taken alone, and added.

    It needs no density, which what is made of transported noise doesn't have; a distribution of several modes has more of it.

    :param samples: one of each distribution, (B, A)
    :param others: another of each, (B, A)
    :return: estimates, whose mean is meant, (B, 1)
    """
    log_distance = 0.5 * ((samples - others).square() + SMALLEST_DISTANCE**2).log()
    return (log_distance + GAUSSIAN_ENTROPY).sum(dim=1, keepdim=True)


def pair_cost(velocities: th.Tensor, others: th.Tensor, shift_cost: float) -> th.Tensor:
    """
    What a transport of noise costs: half the variance of how far it is moved (moved all alike it keeps its spread), and half
    the square of the mean move, at a price. With a price of 1 it is half the mean square, which one move tells, too.

    :param velocities: how far noise was moved, (B, A)
    :param others: how far independent noise was moved under the same conditions, (B, A)
    :param shift_cost: price of moving all noise alike
    :return: estimates, whose mean is meant, summed over the dimensions, (B, 1)
    """
    apart, far = (velocities - others).square(), velocities.square() + others.square()
    return 0.25 * ((1 - shift_cost) * apart + shift_cost * far).sum(dim=1, keepdim=True)


class ExplorationOptions(Options):
    """How a policy with a temperature explores."""

    exploration: str = option(
        default="none",
        one_of=EXPLORATIONS,
        fixed=True,
        before="none",
        doc='with a temperature: "gaussian" adds noise to the action, from scratch of a standard deviation that is learned, '
        'as SAC does; "transport" carries the noise z itself to the action, at a cost that keeps several ways of acting, '
        'and after an offline phase is as "gaussian"; "none" is as "transport", but adds nothing after an offline phase',
    )


class Explored(NamedTuple):
    """
    Actions that explore, with what that costs.

    :param actions: scaled actions, (B, A)
    :param cost: what the temperature weighs against their values, (B, 1)
    :param entropy: estimates, whose mean is meant, of the policy's entropy, (B, 1)
    """

    actions: th.Tensor
    cost: th.Tensor
    entropy: th.Tensor


class ExploringModel(ExplorationOptions, ConsistencyModel):
    """
    A consistency model that, told so, explores.

    At its highest noise level a consistency model has no path from the noise to the action but through the network (c_skip
    sigma_max is 0.003): a Q term makes one action of all noise. It has four forms:

    - "plain": the consistency model.
    - "added", after an offline phase: a = f(z, s) + sigma eps, clamped to [-1, 1].
    - "squashed", from scratch: a = tanh(F(z, s) + sigma(s) eps), SAC's policy with z. F is the same network at the same level.
    - "transport", from scratch: a = tanh(z + F(z, s)), with z clipped to [-1, 1]. The cost of moving the noise
      (:func:`pair_cost`) keeps it alive.

    Source: Haarnoja et al. 2018 (SAC); the policy and cost of FLAC (arXiv 2602.12829).
    """

    form: str = option(default="plain", one_of=FORMS, doc="which of the forms it has; the algorithm tells it")

    def build(self) -> None:
        super().build()
        if self.exploration != "none":
            layers = mlp_layers([self.cond_dim, LOG_STD_WIDTH, self.event_shape[0]], nn.ReLU)
            self.log_std = nn.Sequential(*layers)
            self.start_spread(UNIT_ENTROPY)

    @property
    def explores(self) -> bool:
        return self.form != "plain"

    @property
    def is_from_scratch(self) -> bool:
        return self.form in ("squashed", "transport")

    @property
    def n_added(self) -> int:
        return int(self.form in ("added", "squashed"))

    def start_spread(self, entropy: float) -> None:
        """
        Begin with one standard deviation in all states.

        :param entropy: of the noise that is added, before tanh, per dimension
        """
        weight, bias = self.log_std[-1].parameters()
        nn.init.zeros_(weight)
        nn.init.constant_(bias, entropy - UNIT_ENTROPY)

    def jump(self, z: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param z: noise, (B, A)
        :param cond: condition, (B, F)
        :return: F(z, s), what the network says at the highest noise level, (B, A)
        """
        return self.network.at_levels((math.log(self.sigma_max),), cond)(z, 0, 1.0)

    def carry(self, noise: th.Tensor, cond: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param noise: standard normal noise, (B, A)
        :param cond: condition, (B, F)
        :return: where a transport gets it to, of which tanh is the action; how far it is moved, both (B, A)
        """
        z = noise.clamp(-1, 1)
        moved = self.jump(z, cond)
        return z + moved, moved

    def spread(self, means: th.Tensor, noise: th.Tensor, cond: th.Tensor) -> Explored:
        """
        Add noise to actions: from scratch of a standard deviation that depends on the state, after an offline phase of the
        one it began with.

        The entropy is that of the noise, given z: a lower bound of the policy's. What clamping takes is not counted.

        :param means: actions, of a squashed policy before tanh, (B, A)
        :param noise: standard normal noise, (B, A)
        :param cond: condition, (B, F)
        :return: the actions, minus their entropy as the cost
        """
        if self.form == "added":
            # critics that learned from data hardly mind noise: learned, it grows until it fills the action space
            _, bias = self.log_std[-1].parameters()
            log_std = bias.detach().expand_as(means)
        else:
            log_std = in_float32(self.log_std, cond).clamp(*LOG_STD_LIMITS)
        raw = means + log_std.exp() * noise
        # half, and not half the square of the noise: its mean
        entropy = log_std + UNIT_ENTROPY
        if self.form == "squashed":
            # log(1 - tanh^2)
            entropy = entropy + 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        entropy = entropy.sum(dim=1, keepdim=True)
        return Explored(raw.tanh() if self.form == "squashed" else clamp_action(raw), -entropy, entropy)

    def denoise(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        See :meth:`GenerativeModel.denoise`; of a squashed policy the action before tanh.
        """
        if self.form == "transport":
            return self.carry(noise[0], cond)[0].tanh()
        if self.form == "squashed":
            return self.jump(SQUASHED_NOISE_SCALE * noise[0], cond)
        return super().sample(noise, cond)

    def explore(self, noise: th.Tensor, cond: th.Tensor, shift_cost: float) -> Explored:
        """
        :param noise: standard normal noise, as :meth:`sample` takes it; of a transport two independent draws, (2, B, A)
        :param cond: condition, (B, F)
        :param shift_cost: of a transport, see :func:`pair_cost`
        :return: actions, with what they cost
        """
        if self.form != "transport":
            return self.spread(self.denoise(noise[:-1], cond), noise[-1], cond)
        ends, moved = self.carry(noise[0], cond)
        with th.no_grad():
            other_ends, others = self.carry(noise[1], cond)
            # before tanh: where actions at the bounds are good, it is no lack of exploration that they lie together
            entropy = pair_entropy(ends, other_ends)
        cost = pair_cost(moved, others, shift_cost)
        # the gradient by way of the others, which is the same in the mean, is left out: this one counts twice
        return Explored(ends.tanh(), 2 * cost - cost.detach(), entropy)

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        n_passes = len(noise) - self.n_added
        actions = self.denoise(noise[:n_passes], cond)
        return self.spread(actions, noise[-1], cond).actions if self.n_added else actions

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        passes, *rest = super().noise_shape(batch_size, 1 if self.is_from_scratch else n_steps)
        return passes + self.n_added, *rest

    def exploring_noise_shape(self, batch_size: int) -> tuple[int, ...]:
        """
        :param batch_size: number of rows B
        :return: shape of the noise that :meth:`explore` takes
        """
        passes, *rest = self.noise_shape(batch_size)
        return 2 if self.form == "transport" else passes, *rest
