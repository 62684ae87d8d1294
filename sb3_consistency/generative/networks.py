"""Networks of the actor: noise-level embedding and the two backbones."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_consistency.generative.schedules import cached


class _MishFunction(th.autograd.Function):
    """
    Mish with a single sigmoid, and its derivative taken while everything is in the cache.

    With r = sigmoid(-x) and d = 1 / (1 + r^2): tanh(softplus(x)) = 2 d - 1 and
    d/dx mish(x) = 2 d - 1 + 4 x (1 - r) d (1 - d), so neither tanh nor log1p is evaluated, and nothing overflows.
    PyTorch's own CPU kernel costs as much as the 256 x 256 linear layer before it; its sigmoid costs half of its exp.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        negative = th.neg(x)
        r = negative.sigmoid()
        d = r.square().add_(1).reciprocal_()
        mish = negative.addcmul_(x, d, value=2)
        if ctx.needs_input_grad[0]:
            factors = th.addcmul(x, x, r, value=-1), th.addcmul(d, d, d, value=-1)
            ctx.save_for_backward(d.mul_(2).sub_(1).addcmul_(*factors, value=4))
        return mish

    @staticmethod
    def backward(ctx: Any, *grad_outputs: th.Tensor) -> th.Tensor:
        (slope,) = ctx.saved_tensors
        grad: th.Tensor = slope * grad_outputs[0]
        return grad


def elementary_mish(x: th.Tensor) -> th.Tensor:
    """
    Mish with one exponential and arithmetic: what a compiler fuses, and every runtime has a fast kernel for.

    With e = exp(x): tanh(softplus(x)) = (e^2 + 2 e) / (e^2 + 2 e + 2).

    :param x: any shape
    :return: x tanh(softplus(x)), the shape of ``x``
    """
    e = x.clamp(max=20.0).exp()
    w = e * (e + 2)
    return x * (w / (w + 2))


class Mish(nn.Module):
    """Mish activation x tanh(softplus(x)) (Misra 2019), equal to ``torch.nn.Mish`` and faster on CPUs."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        exporting = th.compiler.is_exporting() or th.jit.is_tracing()  # type: ignore[no-untyped-call]
        if th.compiler.is_compiling() and not exporting:
            return elementary_mish(x)  # fused, in float32 whatever the tensor's type
        # exporters know the plain form; for few numbers the calls cost more than the arithmetic; 2 d - 1 takes 7 digits
        if exporting or x.numel() <= 4096 or x.dtype not in (th.float32, th.float64):
            return F.mish(x)
        if not (x.requires_grad and th.is_grad_enabled()):
            negative = th.neg(x)
            r = th.sigmoid(negative)
            # inside torch.func.jvp a tensor does not tell that a gradient will be taken of it: keep r
            squared = r.square() if th.is_grad_enabled() else r.square_()
            return th.addcdiv(negative, x, squared.add_(1), value=2)
        return _MishFunction.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class NoiseLevelEmbedding(nn.Module):
    """
    Sinusoidal embedding of a noise level, followed by a small MLP.

    sin and cos of ``scale * level`` at frequencies exp(-i ln(1e4) / (h - 1)), through Linear, Mish, Linear.

    The level is ln(sigma) for a consistency model, the step number for a diffusion model.

    Source: Song et al. 2023, appendix C (scale 250); Ding & Jin 2024 (8 frequencies, 16 -> 32 -> 16); Wang et al. 2022
    (scale 1). With scale 250 neighbouring noise levels look unrelated to the network; a smooth embedding learns sooner
    (docs/notebook/2026-11.md).

    :param dim: size of the embedding, even, at least 4
    :param scale: factor of the level
    :raises ValueError: if ``dim`` is odd or too small
    """

    frequencies: th.Tensor

    def __init__(self, dim: int = 16, scale: float = 1.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"embedding_dim must be even and at least 4, got {dim}.")
        self.n_frequencies, self.scale = dim // 2, scale
        self.register_buffer("frequencies", sinusoid_frequencies(dim // 2, scale), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), Mish(), nn.Linear(2 * dim, dim))

    def extra_repr(self) -> str:
        return f"scale={self.scale}"

    def forward(self, level: th.Tensor) -> th.Tensor:
        """
        :param level: noise levels as the network is to see them, (B,)
        :return: embedding, (B, dim)
        """
        return self.mlp(sinusoids(level, self.frequencies))  # type: ignore[no-any-return]

    def constant(self, levels: tuple[float, ...]) -> th.Tensor:
        """
        :param levels: noise levels that are known numbers
        :return: embedding, (len(levels), dim); all of it that no parameter changes is computed only once
        """
        frequencies = self.frequencies
        fixed = _fixed_sinusoids(levels, self.n_frequencies, self.scale, frequencies.device, frequencies.dtype)
        return self.mlp(fixed)  # type: ignore[no-any-return]


def sinusoids(level: th.Tensor, frequencies: th.Tensor) -> th.Tensor:
    """
    :param level: noise levels, (B,)
    :param frequencies: (h,)
    :return: sines, then cosines, (B, 2 h)
    """
    angles = level.unsqueeze(-1) * frequencies
    return th.cat([angles.sin(), angles.cos()], dim=-1)


def sinusoid_frequencies(n: int, scale: float) -> th.Tensor:
    """
    :param n: how many
    :param scale: factor of all of them
    :return: scale exp(-i ln(1e4) / (n - 1)), (n,)
    """
    return scale * th.exp(-math.log(10_000) / (n - 1) * th.arange(n))


@cached
def _fixed_sinusoids(levels: tuple[float, ...], n: int, scale: float, device: th.device, dtype: th.dtype) -> th.Tensor:
    # kept for training, too, whatever mode the first call is made in
    with th.inference_mode(False):
        return sinusoids(th.tensor(levels), sinusoid_frequencies(n, scale)).to(device, dtype)


def in_float32(layer: Callable[..., Any], *inputs: th.Tensor) -> Any:
    """
    Evaluate a layer in float32 where autocast would not: bfloat16 has three digits, too few for values and actions.

    :param layer: layer or function of tensors
    :param inputs: its inputs
    :return: its output
    """
    device = inputs[0].device.type
    if not th.is_autocast_enabled(device):
        return layer(*inputs)
    with th.autocast(device, enabled=False):
        return layer(*(x.float() for x in inputs))


def remaining_layers(layers: Sequence[Callable[..., th.Tensor]], h: th.Tensor) -> th.Tensor:
    """
    Evaluate the layers after the first, the last of them in float32.

    :param layers: layers after the first
    :param h: output of the first layer
    :return: output of the last
    """
    for layer in layers[:-1]:
        h = layer(h)
    return in_float32(layers[-1], h) if layers else h


def mlp_layers(dims: Sequence[int], activation_fn: type[nn.Module]) -> list[nn.Module]:
    """
    Linear layers between consecutive sizes, each but the last followed by the activation.

    :param dims: sizes of input, hidden layers and output
    :return: the layers in order
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(dims):
        layers += [nn.Linear(n_in, n_out), activation_fn()]
    return layers[:-1]


class ConditionalNetwork(nn.Module):
    """Layers on concat(x, embedding of the noise level, condition); subclasses build ``layers``."""

    layers: nn.Sequential

    def __init__(self, x_dim: int, cond_dim: int, embedding_dim: int, embedding_scale: float) -> None:
        super().__init__()
        self.input_sizes = [x_dim, embedding_dim, cond_dim]
        self.embedding = NoiseLevelEmbedding(embedding_dim, embedding_scale)

    def forward(self, x: th.Tensor, level: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy input, (B, x_dim)
        :param level: ln(sigma) or step number, (B,), or (1,) when all rows share one (then it is embedded only once)
        :param cond: condition, (B, cond_dim)
        :return: output, (B, x_dim)
        """
        return self._evaluate(x, in_float32(self.embedding, level), cond)

    def _evaluate(self, x: th.Tensor, embedding: th.Tensor, cond: th.Tensor) -> th.Tensor:
        first, *rest = self.layers
        inputs = th.cat([x, embedding.expand(x.shape[0], -1), cond], dim=-1)
        return remaining_layers(rest, in_float32(first, inputs))

    def at_levels(self, levels: tuple[float, ...], cond: th.Tensor) -> Callable[[th.Tensor, int, float], th.Tensor]:
        """
        The network with its noise levels and condition fixed, as a sampler calls it.

        Of several levels, the embeddings are constants and go into the first layer's bias, and the condition passes
        through the first layer only once, so a call costs one plain MLP pass. With one level there is nothing to share.

        :param levels: the S levels that will be used
        :param cond: condition, (B, cond_dim)
        :return: function of (x (B, x_dim), number of the level, scale), equal to :meth:`forward` of scale x at that level
        """
        if len(levels) == 1:
            embedding = in_float32(lambda _: self.embedding.constant(levels), cond)
            return lambda x, i, scale: self._evaluate(scale * x, embedding, cond)
        first, *rest = self.layers
        assert isinstance(first, nn.Linear)
        x_weight, level_weight, cond_weight = th.split(first.weight, self.input_sizes, dim=1)

        def constant_part(cond: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            return F.linear(cond, cond_weight), F.linear(self.embedding.constant(levels), level_weight, first.bias)

        fixed, biases = in_float32(constant_part, cond)

        def evaluate(x: th.Tensor, i: int, scale: float) -> th.Tensor:
            first_layer = partial(th.addmm, alpha=scale)
            return remaining_layers(rest, in_float32(first_layer, fixed + biases[i], x, x_weight.T))

        return evaluate


class ConditionalMlp(ConditionalNetwork):
    """
    MLP on concat(x, embedding of the noise level, condition).

    Source: the released networks of Ding & Jin and of CPQL (three layers of 256, Mish).

    :param x_dim: size of the noisy input and of the output
    :param cond_dim: size of the condition (observation features)
    :param net_arch: hidden layer sizes
    :param activation_fn: activation class
    :param embedding_dim: size of the noise-level embedding
    :param embedding_scale: its factor of the level
    """

    def __init__(
        self,
        x_dim: int,
        cond_dim: int,
        net_arch: Sequence[int] = (256, 256, 256),
        activation_fn: type[nn.Module] = Mish,
        embedding_dim: int = 16,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__(x_dim, cond_dim, embedding_dim, embedding_scale)
        self.layers = nn.Sequential(*mlp_layers([x_dim + embedding_dim + cond_dim, *net_arch, x_dim], activation_fn))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


class LnResnet(ConditionalNetwork):
    """
    Residual network with layer normalisation, the alternative backbone of Ding & Jin's ablation.

    One block of Dropout, LayerNorm, Linear(4x), ReLU, Linear per entry of ``net_arch``, between an input
    Linear + ReLU and an output ReLU + Linear.

    :param x_dim: size of the noisy input and of the output
    :param cond_dim: size of the condition
    :param net_arch: the width, once per block (all entries equal)
    :param dropout: dropout probability inside the blocks
    :param embedding_dim: size of the noise-level embedding
    :param embedding_scale: its factor of the level
    :raises ValueError: if ``net_arch`` is empty or its entries differ
    """

    def __init__(
        self,
        x_dim: int,
        cond_dim: int,
        net_arch: Sequence[int] = (256, 256, 256),
        dropout: float = 0.1,
        embedding_dim: int = 16,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__(x_dim, cond_dim, embedding_dim, embedding_scale)
        if len(net_arch) == 0 or len(set(net_arch)) != 1:
            raise ValueError(f"network='ln_resnet' needs a net_arch with one width, once per block, got {list(net_arch)}.")
        width = net_arch[0]
        self.layers = nn.Sequential(
            nn.Linear(x_dim + embedding_dim + cond_dim, width),
            nn.ReLU(),
            *(_ResidualBlock(width, dropout) for _ in net_arch),
            nn.ReLU(),
            nn.Linear(width, x_dim),
        )


NETWORKS: Mapping[str, Callable[..., ConditionalNetwork]] = {"mlp": ConditionalMlp, "ln_resnet": LnResnet}


def make_network(name: str, x_dim: int, cond_dim: int, kwargs: Mapping[str, Any] | None = None) -> ConditionalNetwork:
    """
    :param name: "mlp" or "ln_resnet"
    :param x_dim: size of the noisy input and of the output
    :param cond_dim: size of the condition
    :param kwargs: further arguments of the network
    :return: a network of (x, level, cond)
    :raises ValueError: if there is none of that name
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {[*NETWORKS, 'unet']}, got {name!r}.")
    return NETWORKS[name](x_dim, cond_dim, **(kwargs or {}))
