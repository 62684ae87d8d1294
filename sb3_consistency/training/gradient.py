"""A loss with its gradient, and what changes its speed and nothing else: compilation and reduced precision."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import TensorDict

from sb3_consistency.compiled import Compiled

PRECISIONS = ("float32", "bf16")


def check_precision(precision: str, device: th.device) -> None:
    """
    Warn of a precision that is slower than float32.

    :param precision: "float32" or "bf16"
    :param device: where the model trains
    """
    if precision == "bf16" and not _is_bf16_fast(device):
        warnings.warn(
            f"precision='bf16': {device} has no bfloat16 arithmetic, so it is emulated and slower; use precision='float32'.",
            stacklevel=2,
        )


def _is_bf16_fast(device: th.device) -> bool:
    if device.type == "cpu":
        return th.cpu._is_avx512_bf16_supported() or th.cpu._is_amx_tile_supported()
    return device.type != "cuda" or th.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: str, device: th.device) -> AbstractContextManager[Any]:
    """
    Products of large matrices in the given precision.

    Weights, optimizer, losses, targets, and the first and last layers of the networks (of a U-Net the last) stay in
    float32, see :func:`sb3_consistency.generative.networks.in_float32`.

    :param precision: "float32" or "bf16"
    :param device: where the model trains
    :return: context to evaluate a loss in
    """
    return th.autocast(device.type, dtype=th.bfloat16) if precision == "bf16" else nullcontext()


class LossGradient:
    """
    A loss with its gradient, compiled as one function if wanted.

    One function is faster than a forward and a backward pass (docs/performance.md): no intermediate result is handed over,
    and autograd has nothing to do.

    :param loss_fn: batch -> loss (scalar), scalars to log
    :param parameters: what to take the gradient of
    :param precision: "float32" or "bf16", of the loss
    :param compile: whether to compile
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], tuple[th.Tensor, TensorDict]],
        parameters: Sequence[th.Tensor],
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        def loss_and_gradient(batch: Any) -> tuple[th.Tensor, TensorDict, list[th.Tensor | None]]:
            with autocast(precision, parameters[0].device):
                loss, info = loss_fn(batch)
            trained = [p for p in parameters if p.requires_grad]
            gradients = iter(th.autograd.grad(loss, trained, allow_unused=True))
            return loss.detach(), info, [_in_layout_of(p, next(gradients)) if p.requires_grad else None for p in parameters]

        self.parameters = parameters
        name = getattr(loss_fn, "__name__", "the loss")
        self.function = Compiled(loss_and_gradient, name) if compile else loss_and_gradient

    def __call__(self, batch: Any) -> tuple[th.Tensor, TensorDict, list[th.Tensor | None]]:
        """
        :param batch: what the loss takes
        :return: loss (detached), scalars to log, gradient of each parameter (None where it is
            frozen, or the loss does not depend on it)
        """
        return self.function(batch)


def _in_layout_of(parameter: th.Tensor, gradient: th.Tensor | None) -> th.Tensor | None:
    """Fused optimizers walk through the memory of both side by side; ``backward()`` sees to it, ``grad()`` doesn't."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return th.empty_like(parameter).copy_(gradient)
