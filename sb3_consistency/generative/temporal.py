"""Networks of a window of trajectory: the temporal U-Net and an MLP over the window's frequencies."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch as th
from torch import nn

from sb3_consistency.generative.networks import Mish, NoiseLevelEmbedding, in_float32, remaining_layers

#: for each of several evaluations, the logarithms of the noise levels that the network is told
KnownLevels = Sequence[tuple[float, ...]]


class _TemporalNetwork(nn.Module):
    """
    A network of a window, one or two noise levels and a condition; subclasses supply :meth:`evaluate`.

    The embedding of the second level comes last among the inputs, so that a network with two levels is one with a
    single level plus some columns: see :meth:`warm_start`.

    :param cond_features: size of the condition as :meth:`combine` sees it
    :param n_levels: number of noise levels that the network is told, 1 or 2
    :param embedding_dim: size of the embedding of each
    :param embedding_scale: factor of the level in the embedding
    """

    def __init__(self, cond_features: int, n_levels: int, embedding_dim: int, embedding_scale: float) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(NoiseLevelEmbedding(embedding_dim, embedding_scale) for _ in range(n_levels))
        self.context_dim = cond_features + n_levels * embedding_dim

    def context(self, cond: th.Tensor, embedded: Sequence[th.Tensor]) -> th.Tensor:
        """
        :param cond: condition, (B, cond_features)
        :param embedded: embeddings of the noise levels, each (B or 1, embedding_dim)
        :return: embedding of the first level, condition, embedding of the second, (B, context_dim)
        """
        # shape, and not len: the batch size stays open when a policy is exported
        first, *more = (e.expand(cond.shape[0], -1) for e in embedded)
        return th.cat([first, cond, *more], dim=-1)

    def encode(self, cond: th.Tensor) -> th.Tensor:
        """
        :param cond: condition, (B, cond_dim)
        :return: condition as :meth:`context` sees it, (B, cond_features)
        """
        return cond

    @abstractmethod
    def evaluate(self, x: th.Tensor, context: th.Tensor, sigma: th.Tensor | float) -> th.Tensor:
        """
        :param x: noisy window, (B, H, D)
        :param context: what :meth:`context` returns, (B, context_dim)
        :param sigma: first noise level, (B, 1), or (1, 1), or one number
        :return: output, (B, H, D)
        """

    def forward(self, x: th.Tensor, cond: th.Tensor, *levels: th.Tensor) -> th.Tensor:
        """
        :param x: noisy window, (B, H, D)
        :param cond: condition, (B, cond_dim)
        :param levels: logarithms of the noise levels, each (B,), or (1,) when all rows share one
        :return: output, (B, H, D)
        """
        embedded = [in_float32(e, level) for e, level in zip(self.embeddings, levels, strict=True)]
        return self.evaluate(x, self.context(self.encode(cond), embedded), levels[0].exp().unsqueeze(-1))

    def at_levels(self, levels: KnownLevels, cond: th.Tensor) -> Callable[[th.Tensor, int], th.Tensor]:
        """
        Fix the noise levels and the condition, to evaluate the network at several ``x``: what depends on them alone is
        computed once.

        :param levels: for each of S evaluations, the logarithms of its noise levels
        :param cond: condition, (B, cond_dim)
        :return: function of (x (B, H, D), number of the evaluation), equal to :meth:`forward` at its levels
        """

        def embed(_: th.Tensor) -> list[th.Tensor]:
            columns = zip(*levels, strict=True)
            return [e.constant(column) for e, column in zip(self.embeddings, columns, strict=True)]  # type: ignore[operator]

        # the levels are numbers: cond only tells the device
        encoded, embedded = self.encode(cond), in_float32(embed, cond)

        def evaluate(x: th.Tensor, i: int) -> th.Tensor:
            return self.evaluate(x, self.context(encoded, [e[i : i + 1] for e in embedded]), math.exp(levels[i][0]))

        return evaluate

    @th.no_grad()
    def warm_start(self, source: "_TemporalNetwork") -> None:
        """
        Take the weights of a network with fewer noise levels, so that this one computes the same function.

        What has more columns here gets zeros in them.

        :param source: network of the same architecture
        """
        own = self.state_dict()
        for name, weight in source.state_dict().items():
            if weight.shape == own[name].shape:
                own[name].copy_(weight)
            else:
                own[name].zero_()
                own[name][:, : weight.shape[1]] = weight


class _ConvBlock(nn.Sequential):
    """Convolution over time, group normalisation, activation."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, activation_fn: type[nn.Module]) -> None:
        super().__init__(
            nn.Conv1d(n_in, n_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(math.gcd(8, n_out), n_out),
            activation_fn(),
        )


class _FilmBlock(nn.Module):
    """Residual block of two convolutions; the context scales and shifts the channels between them (FiLM)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        context_dim: int,
        kernel_size: int,
        activation_fn: type[nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.first = _ConvBlock(n_in, n_out, kernel_size, activation_fn)
        self.film = nn.Linear(context_dim, 2 * n_out)
        self.dropout = nn.Dropout(dropout)
        self.second = _ConvBlock(n_out, n_out, kernel_size, activation_fn)
        self.shortcut = nn.Identity() if n_in == n_out else nn.Conv1d(n_in, n_out, 1)

    def forward(self, x: th.Tensor, context: th.Tensor) -> th.Tensor:
        scale, shift = self.film(context).unsqueeze(-1).chunk(2, dim=1)
        hidden = self.first(x) * (1 + scale) + shift
        return self.second(self.dropout(hidden)) + self.shortcut(x)  # type: ignore[no-any-return]


class TemporalUnet(_TemporalNetwork):
    """
    U-Net over time: residual blocks at every resolution, time halved between them, condition and noise level by FiLM.

    Source: Janner et al. 2022 (Diffuser), Chi et al. 2023 (Diffusion Policy), with whose widths RACTD is published
    (512-1024-2048); kernel 5, 8 groups, Mish.

    :param event_shape: shape (H, D) of the window; H is a multiple of 2^(len(net_arch) - 1)
    :param cond_dim: size of the condition
    :param n_levels: number of noise levels that the network is told, 1 or 2
    :param net_arch: channels at every resolution, from fine to coarse
    :param activation_fn: activation class
    :param embedding_dim: size of the embedding of a noise level
    :param embedding_scale: factor of the level in the embedding
    :param kernel_size: width of the convolutions, odd
    :param blocks: residual blocks at every resolution, on the way down and on the way up
    :param dropout: dropout probability in the residual blocks
    :raises ValueError: if ``net_arch`` is empty or H is no such multiple
    """

    def __init__(
        self,
        event_shape: tuple[int, int],
        cond_dim: int,
        n_levels: int = 1,
        net_arch: Sequence[int] = (64, 128, 256),
        activation_fn: type[nn.Module] = Mish,
        embedding_dim: int = 32,
        embedding_scale: float = 1.0,
        kernel_size: int = 5,
        blocks: int = 2,
        dropout: float = 0.0,
    ) -> None:
        horizon, width = event_shape
        if len(net_arch) == 0:
            raise ValueError("net_arch of network='unet' needs at least one width, got none.")
        if horizon % 2 ** (len(net_arch) - 1):
            raise ValueError(
                f"horizon must be a multiple of {2 ** (len(net_arch) - 1)} for a U-Net of the {len(net_arch)} resolutions "
                f"net_arch={list(net_arch)}, got {horizon}; use fewer, or network='mlp'."
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, or the plan would change its length, got {kernel_size}.")
        cond_features = 4 * embedding_dim
        super().__init__(cond_features, n_levels, embedding_dim, embedding_scale)
        self.cond_encoder = nn.Sequential(
            nn.Linear(cond_dim, cond_features), activation_fn(), nn.Linear(cond_features, cond_features), activation_fn()
        )
        context_dim = self.context_dim

        def stage(n_in: int, n_out: int) -> nn.ModuleList:
            sizes = pairwise([n_in, *(blocks * [n_out])])
            return nn.ModuleList(_FilmBlock(a, b, context_dim, kernel_size, activation_fn, dropout) for a, b in sizes)

        self.down = nn.ModuleList(stage(a, b) for a, b in pairwise([width, *net_arch]))
        self.shrink = nn.ModuleList(nn.Conv1d(n, n, 3, stride=2, padding=1) for n in net_arch[:-1])
        self.middle = stage(net_arch[-1], net_arch[-1])
        # every step up gets the finer resolution's features beside its own
        coarse_to_fine = list(pairwise(reversed(net_arch)))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(a, b, 4, stride=2, padding=1) for a, b in coarse_to_fine)
        self.up = nn.ModuleList(stage(2 * b, b) for _, b in coarse_to_fine)
        self.out = nn.Sequential(
            _ConvBlock(net_arch[0], net_arch[0], kernel_size, activation_fn), nn.Conv1d(net_arch[0], width, 1)
        )

    def encode(self, cond: th.Tensor) -> th.Tensor:
        return self.cond_encoder(cond)  # type: ignore[no-any-return]

    def evaluate(self, x: th.Tensor, context: th.Tensor, sigma: th.Tensor | float) -> th.Tensor:
        hidden, skips = x.transpose(1, 2), []
        for i, stage in enumerate(self.down):
            hidden = _run(stage, hidden, context)
            if i < len(self.shrink):
                skips.append(hidden)
                hidden = self.shrink[i](hidden)
        hidden = _run(self.middle, hidden, context)
        for grow, stage in zip(self.grow, self.up, strict=True):
            hidden = _run(stage, th.cat([grow(hidden), skips.pop()], dim=1), context)
        return in_float32(self.out, hidden).transpose(1, 2)  # type: ignore[no-any-return]


class ChunkUnet(nn.Module):
    """
    A :class:`TemporalUnet` of chunks that lie as one long action, called as the other backbones of an action are.

    :param horizon: number H of actions in a chunk
    :param action_dim: size A of one
    :param cond_dim: size of the condition
    :param kwargs: further arguments of the U-Net
    """

    def __init__(self, horizon: int, action_dim: int, cond_dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.event_shape = (horizon, action_dim)
        self.unet = TemporalUnet(self.event_shape, cond_dim, **kwargs)

    def forward(self, x: th.Tensor, level: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param x: noisy chunks, (B, H A)
        :param level: ln(sigma) or step number, (B,), or (1,) when all rows share one
        :param cond: condition, (B, cond_dim)
        :return: output, (B, H A)
        """
        return self._evaluate(x, self.unet.encode(cond), in_float32(self.unet.embeddings[0], level))

    def _evaluate(self, x: th.Tensor, encoded: th.Tensor, embedded: th.Tensor) -> th.Tensor:
        # a U-Net sees the noise level by its embedding alone
        windows = self.unet.evaluate(x.reshape(-1, *self.event_shape), self.unet.context(encoded, [embedded]), sigma=1.0)
        return windows.flatten(1)

    def at_levels(self, levels: tuple[float, ...], cond: th.Tensor) -> Callable[[th.Tensor, int, float], th.Tensor]:
        """
        :param levels: the S levels that will be used
        :param cond: condition, (B, cond_dim)
        :return: function of (x (B, H A), number of the level, scale), equal to :meth:`forward` of scale x at that level
        """
        embedding: Any = self.unet.embeddings[0]
        encoded, embedded = self.unet.encode(cond), in_float32(lambda _: embedding.constant(levels), cond)
        return lambda x, i, scale: self._evaluate(scale * x, encoded, embedded[i : i + 1])


def _run(stage: nn.Module, x: th.Tensor, context: th.Tensor) -> th.Tensor:
    for block in stage.children():
        x = block(x, context)
    return x


def cosine_transform(n: int) -> th.Tensor:
    """
    :param n: number of points
    :return: the orthonormal discrete cosine transform (type II) as a matrix, (n, n); row k has frequency k
    """
    k, t = th.arange(n, dtype=th.float64)[:, None], th.arange(n, dtype=th.float64)
    cosines = math.sqrt(2 / n) * th.cos(math.pi / n * k * (t + 0.5))
    cosines[0] /= math.sqrt(2)
    return cosines.float()


def coloured_noise(noise: th.Tensor, slope: th.Tensor, cosines: th.Tensor) -> th.Tensor:
    """
    Noise that moves a window the more smoothly, the larger ``slope`` is; white noise hardly moves one in any smooth direction.

    :param noise: standard normal noise, (B, H, D)
    :param slope: frequency k gets an amplitude proportional to (1 + k)^-slope, (B,)
    :param cosines: :func:`cosine_transform` of H, (H, H)
    :return: noise with the same mean variance, 1, (B, H, D)
    """
    k = th.arange(1, noise.shape[1] + 1, device=noise.device)
    amplitude = k ** -slope.unsqueeze(-1)
    amplitude = amplitude / amplitude.square().mean(dim=1, keepdim=True).sqrt()
    return cosines.T @ (amplitude.unsqueeze(-1) * noise)


class TemporalMlp(_TemporalNetwork):
    """
    MLP over the whole window, its condition and its noise levels, much cheaper on a CPU than a U-Net.

    It works on the window's frequencies (cosine transform over time), and to its output is added the scaled window over the
    noise level, every coefficient times a factor that depends on level and condition. A denoiser has to tell the noise of
    all H D elements, which does not fit through a hidden layer of fewer units; where noise drowns a frequency, as it soon
    does the high ones of smooth paths, the factor alone takes it away (Wiener's filter), and the hidden units have the rest.
    As c_skip = sigma_data c_in c_out / sigma (well above sigma_min), much the same factor takes a coefficient away at every
    level.

    :param event_shape: shape (H, D) of the window
    :param cond_dim: size of the condition
    :param n_levels: number of noise levels that the network is told, 1 or 2
    :param net_arch: hidden layer sizes
    :param activation_fn: activation class
    :param embedding_dim: size of the embedding of a noise level
    :param embedding_scale: factor of the level in the embedding
    :param dropout: dropout probability after every hidden layer
    """

    def __init__(
        self,
        event_shape: tuple[int, int],
        cond_dim: int,
        n_levels: int = 1,
        net_arch: Sequence[int] = (256, 256, 256),
        activation_fn: type[nn.Module] = Mish,
        embedding_dim: int = 32,
        embedding_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(cond_dim, n_levels, embedding_dim, embedding_scale)
        self.event_shape = event_shape
        size = math.prod(event_shape)
        sizes = [size + self.context_dim, *net_arch]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation_fn(), nn.Dropout(dropout))]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], size))
        self.shortcut = nn.Linear(self.context_dim, size)
        nn.init.zeros_(self.shortcut.weight)
        nn.init.zeros_(self.shortcut.bias)
        self.register_buffer("cosines", cosine_transform(event_shape[0]), persistent=False)

    cosines: th.Tensor

    def evaluate(self, x: th.Tensor, context: th.Tensor, sigma: th.Tensor | float) -> th.Tensor:
        first, *rest = self.layers
        frequencies = in_float32(th.matmul, self.cosines, x).flatten(1)
        output = remaining_layers(rest, in_float32(first, th.cat([frequencies, context], dim=-1)))
        output = output + in_float32(self.shortcut, context) / sigma * frequencies
        return in_float32(th.matmul, self.cosines.T, output.view(-1, *self.event_shape))  # type: ignore[no-any-return]


TEMPORAL_NETWORKS: Mapping[str, type[_TemporalNetwork]] = {"unet": TemporalUnet, "mlp": TemporalMlp}


def make_temporal_network(name: str, event_shape: tuple[int, int], cond_dim: int, **kwargs: Any) -> _TemporalNetwork:
    """
    :param name: "unet" or "mlp"
    :param event_shape: shape (H, D) of the window
    :param cond_dim: size of the condition
    :param kwargs: further arguments of the network
    :return: a network of (x, cond, *levels)
    :raises ValueError: if there is none of that name
    """
    if name not in TEMPORAL_NETWORKS:
        raise ValueError(f"network must be one of {list(TEMPORAL_NETWORKS)}, got {name!r}.")
    return TEMPORAL_NETWORKS[name](event_shape, cond_dim, **kwargs)  # type: ignore[arg-type]
