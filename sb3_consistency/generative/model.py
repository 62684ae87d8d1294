"""The contract of a generative model: a loss on data and a sampler, both functions of explicit noise."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch as th
from torch import nn

from sb3_consistency.generative.networks import ConditionalNetwork, make_network
from sb3_consistency.generative.temporal import ChunkUnet
from sb3_consistency.options import Options, option

# Maps (noisy data (B, A), noise level (B,)) to an estimate of the clean data (B, A).
Denoiser = Callable[[th.Tensor, th.Tensor], th.Tensor]


class _BoundedGradientClamp(th.autograd.Function):
    @staticmethod
    def forward(ctx, x: th.Tensor) -> th.Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, *grad_outputs: th.Tensor) -> th.Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        # gradient descent moves x along -grad: outside the bounds, keep only what leads back inside
        outward = ((x > 1) & (grad < 0)) | ((x < -1) & (grad > 0))
        return grad.masked_fill(outward, 0)


def clamp_action(x: th.Tensor) -> th.Tensor:
    """
    Clamp to [-1, 1] so that an action outside still learns how to come back, but is not pushed further out.

    A plain clamp has no gradient outside, a straight-through one lets the Q term push the unclamped action away
    without limit; this is the projected gradient.

    :param x: actions, any shape
    :return: clamped actions, the same shape
    """
    if not th.is_grad_enabled():
        return x.clamp(-1, 1)
    return _BoundedGradientClamp.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class GenerativeModel(Options, nn.Module):
    """A model that turns noise into data of shape ``event_shape`` *E, (H A,) for a chunk of actions, given a condition."""

    #: how many uniform numbers per row :meth:`loss` consumes
    n_uniforms: ClassVar[int] = 1
    event_shape: tuple[int, ...] = option(init=False)

    def construct(self, values: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.store(values)
        self.check_options()
        self.build()

    @property
    def is_built(self) -> bool:
        return bool(self._modules)

    @classmethod
    def moving_averages(cls, options: Any) -> dict[str, float]:
        """
        :param options: an algorithm's
        :return: names of further moving averages of the network that :meth:`loss` may take its targets from, their decays
        """
        return {}

    @property
    def regression_target(self) -> str | None:
        """Name of the moving average that :meth:`loss` takes its regression targets from, if it takes them from one."""
        return None

    @property
    def explores(self) -> bool:
        """Whether it explores by itself, see :class:`~sb3_consistency.generative.exploration.ExploringModel`."""
        return False

    @property
    def is_from_scratch(self) -> bool:
        """Whether it explores, and learned online from scratch."""
        return False

    @property
    def n_added(self) -> int:
        """How many draws of the noise, the last ones, are added to the action: deterministic actions are without them."""
        return 0

    @abstractmethod
    def build(self) -> None:
        """Make the network and the tables, once the options are stored and checked."""

    @abstractmethod
    def loss(
        self,
        x0: th.Tensor,
        cond: th.Tensor,
        *,
        noise: th.Tensor,
        u: th.Tensor,
        target: Denoiser | None = None,
        progress: th.Tensor | None = None,
    ) -> th.Tensor:
        """
        Loss of every row, not reduced.

        :param x0: data, (B, *E), scaled to [-1, 1]
        :param cond: condition, (B, F)
        :param noise: standard normal noise, (B, *E)
        :param u: uniform numbers in [0, 1), (B, n_uniforms)
        :param target: supplies regression targets where the loss bootstraps; this model itself when None
        :param progress: share of the training run that is done, scalar in [0, 1]; 1 when None
        :return: loss, (B,)
        """

    @abstractmethod
    def sample(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        Turn noise into data, differentiably. The number of steps is read off the noise.

        :param noise: standard normal noise, (S, B, *E) for a sampler that consumes S draws per row
        :param cond: condition, (B, F)
        :return: data, (B, *E), in [-1, 1]
        """

    def denoise(self, noise: th.Tensor, cond: th.Tensor) -> th.Tensor:
        """
        :param noise: standard normal noise of the passes of :meth:`sample`, without what is added, (S, B, *E)
        :param cond: condition, (B, F)
        :return: data without the noise that is added to explore, (B, *E)
        """
        return self.sample(noise, cond)

    @abstractmethod
    def noise_shape(self, batch_size: int, n_steps: int | None = None) -> tuple[int, ...]:
        """
        :param batch_size: number of rows B
        :param n_steps: number of network evaluations; None for the model's default
        :return: shape (S, B, *E) of the noise that :meth:`sample` takes
        """


class HorizonOptions(Options):
    """How many actions are one piece of data; the model has it, and every network and algorithm around it."""

    horizon: int = option(
        default=1, low=1, fixed=True, before=1, doc="number H of actions that are chosen at once, a chunk (of states: a plan)"
    )


class ActionModel(HorizonOptions, GenerativeModel):
    """
    A generative model of a chunk of actions: a network of noisy actions, their noise level and a condition.

    A chunk is one long action, its H actions one after the other.
    """

    action_dim: int = option(kw_only=False, fixed=True, doc="size A of one action")
    cond_dim: int = option(kw_only=False, fixed=True, doc="size F of the condition")
    network_name: str = option(
        default="mlp",
        alias="network",
        attribute="network_name",
        fixed=True,
        doc='backbone, "mlp" or "ln_resnet" over the whole chunk, or "unet" over its time',
    )
    network_kwargs: Mapping[str, Any] | None = option(
        default=None, fixed=True, doc="further arguments of the backbone (``net_arch``, ``activation_fn``, ...)"
    )
    network: ConditionalNetwork | ChunkUnet = option(init=False)

    def build(self) -> None:
        self.event_shape = (self.horizon * self.action_dim,)
        if self.network_name == "unet":
            self.network = ChunkUnet(self.horizon, self.action_dim, self.cond_dim, **(self.network_kwargs or {}))
        else:
            self.network = make_network(self.network_name, self.event_shape[0], self.cond_dim, self.network_kwargs)
