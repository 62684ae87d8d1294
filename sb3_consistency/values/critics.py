"""Critics and value networks: several networks of one architecture, evaluated as one batched network."""

import math
from collections.abc import Sequence
from functools import partial

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_consistency.generative.networks import Mish, in_float32, remaining_layers


class StackedLinear(nn.Module):
    """
    ``n_members`` independent linear layers evaluated as one batched matrix product.

    Each member is initialised as ``torch.nn.Linear`` is.

    :param n_members: number of layers
    :param n_in: input size
    :param n_out: output size
    """

    def __init__(self, n_members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(th.empty(n_members, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(n_members, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: (n_members, B, n_in), or (B, n_in) for one input shared by all members
        :param members: numbers of the M layers to evaluate, (M,); None for all
        :return: (n_members, B, n_out), or (M, B, n_out)
        """
        weight, bias = _chosen(members, self.weight, self.bias)
        if weight.shape[-1] == 1:
            # CPU libraries do batched products with one column several times as slowly
            return (x * weight.mT).sum(dim=-1, keepdim=True) + bias
        return th.baddbmm(bias, x.expand(weight.shape[0], -1, -1), weight)


def _is_stacked(layer: nn.Module) -> bool:
    return isinstance(layer, (StackedLinear, StackedLayerNorm))


def _chosen(members: th.Tensor | None, *stacked: th.Tensor) -> tuple[th.Tensor, ...]:
    return stacked if members is None else tuple(x.index_select(0, members) for x in stacked)


class StackedLayerNorm(nn.Module):
    """
    Layer normalisation with separate scale and shift for each of ``n_members`` networks.

    :param n_members: number of networks
    :param width: size of the normalised dimension
    """

    def __init__(self, n_members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.ones(n_members, 1, width))
        self.bias = nn.Parameter(th.zeros(n_members, 1, width))

    def forward(self, x: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: (n_members, B, width), or (M, B, width)
        :param members: numbers of the M networks to evaluate, (M,); None for all
        :return: the same shape
        """
        weight, bias = _chosen(members, self.weight, self.bias)
        return th.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


class StackedMlp(nn.Module):
    """
    ``n_members`` independent MLPs of one architecture as one batched network. The value of each is the mean of its outputs.

    :param n_in: input size
    :param net_arch: hidden layer sizes
    :param n_members: number of networks
    :param activation_fn: activation class
    :param layer_norm: normalise every hidden layer before its activation
    :param n_out: number of outputs of each
    """

    def __init__(
        self,
        n_in: int,
        net_arch: Sequence[int] = (256, 256, 256),
        n_members: int = 1,
        activation_fn: type[nn.Module] = Mish,
        layer_norm: bool = False,
        n_out: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in net_arch:
            layers.append(StackedLinear(n_members, n_in, width))
            if layer_norm:
                layers.append(StackedLayerNorm(n_members, width))
            layers.append(activation_fn())
            n_in = width
        self.layers = nn.Sequential(*layers, StackedLinear(n_members, n_in, n_out))

    def forward(self, x: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: input shared by all members, (B, n_in)
        :param members: numbers of the M members to evaluate, (M,); None for all
        :return: one value per row and member, (B, n_members), or (B, M)
        """
        return self.outputs(x, members).mean(dim=-1)

    def outputs(self, x: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: as of :meth:`forward`
        :param members: likewise
        :return: what they say, (B, n_members, n_out), or (B, M, n_out)
        """
        first, *rest = [partial(layer, members=members) if _is_stacked(layer) else layer for layer in self.layers]
        return remaining_layers(rest, in_float32(first, x)).transpose(0, 1)


class StackedCritic(StackedMlp):
    """
    Q(s, a) of ``n_critics`` independent critics, as one batched network.

    :param features_dim: size of the observation features
    :param action_dim: size of the action
    :param net_arch: hidden layer sizes
    :param n_critics: number of critics
    :param activation_fn: activation class
    :param layer_norm: normalise every hidden layer before its activation
    :param n_quantiles: number of quantiles of the return that each learns; Q is their mean. 1 learns Q itself
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        net_arch: Sequence[int] = (256, 256, 256),
        n_critics: int = 2,
        activation_fn: type[nn.Module] = Mish,
        layer_norm: bool = False,
        n_quantiles: int = 1,
    ) -> None:
        super().__init__(features_dim + action_dim, net_arch, n_critics, activation_fn, layer_norm, n_quantiles)

    def forward(  # type: ignore[override]
        self, features: th.Tensor, actions: th.Tensor, members: th.Tensor | None = None
    ) -> th.Tensor:
        """
        :param features: observation features, (B, features_dim)
        :param actions: actions scaled to [-1, 1], (B, action_dim)
        :param members: numbers of the M critics to evaluate, (M,); None for all
        :return: Q-values, (B, n_critics), or (B, M)
        """
        return super().forward(th.cat([features, actions], dim=-1), members)

    def quantiles(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: observation features, (B, features_dim)
        :param actions: actions scaled to [-1, 1], (B, action_dim)
        :return: quantiles of the return, in no order, (B, n_critics, n_quantiles)
        """
        return self.outputs(th.cat([features, actions], dim=-1))
