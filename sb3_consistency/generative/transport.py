"""The transport policy: what a consistency policy is online from scratch, where there is no data to stay near."""

import math

import torch as th

from sb3_consistency.generative.consistency import ConsistencyModel
from sb3_consistency.options import option

#: what the mean of log |x - x'| lacks to the entropy, for a Gaussian number: (1 + log(2 pi) + Euler's constant) / 2
GAUSSIAN_ENTROPY = 0.5 * (1 + math.log(2 * math.pi) + 0.5772156649)
SMALLEST_DISTANCE = 1e-3


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


class TransportModel(ConsistencyModel):
    """
    A consistency model that, told so, acts as a transport of noise: a = tanh(z + v(z, s)), with z clipped to [-1, 1].

    At its highest noise level a consistency model has no path from the noise to the action but through the network (c_skip
    sigma_max is 0.003): a Q term makes one action of all noise. Here the noise is added to what the network says, and the cost
    of moving it (:func:`pair_cost`) keeps it alive. v is the same network at the same noise level.

    Source: the policy and cost of FLAC (arXiv 2602.12829).
    """

    transport: bool = option(default=False, doc="whether it acts as a transport of noise; the algorithm tells it")

    @property
    def is_transport(self) -> bool:
        return self.transport

    def carry(self, noise: th.Tensor, cond: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param noise: standard normal noise, (B, A)
        :param cond: condition, (B, F)
        :return: where it gets to, of which tanh is the action; how far it was moved, v, both (B, A)
        """
        z = noise.clamp(-1, 1)
        velocity = self.network.at_levels((math.log(self.sigma_max),), cond)(z, 0, 1.0)
        return z + velocity, velocity

    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :meth:`ConsistencyModel.sample`, or of a transport one pass.

        See :meth:`GenerativeModel.sample` for the parameters.
        """
        return self.carry(noise[0], cond)[0].tanh() if self.transport else super().sample(noise, cond)

    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        return super().noise_shape(batch_size, 1 if self.transport else n_steps)
