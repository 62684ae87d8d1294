"""What changes the speed of a gradient step and nothing else: compilation and reduced precision."""

import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
import torch._functorch.config

PRECISIONS = ("float32", "bf16")


def check_precision(precision: str, device: th.device) -> None:
    """
    :param precision: "float32" or "bf16"
    :param device: where the model trains
    :raises ValueError: if there is no such precision
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
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


class CompiledLoss:
    """
    A loss compiled at its first call; where that fails (no C++ compiler, say), the loss itself, with one warning.

    :param loss_fn: method that takes a batch
    """

    def __init__(self, loss_fn: Callable[[Any], Any]) -> None:
        self.plain: Callable[[Any], Any] = loss_fn
        # random numbers as without compilation, so that both give the same results
        self.run = th.compile(_with_own_code(loss_fn), dynamic=False, options={"fallback_random": True})
        self.compiles = self.is_first = True

    def __call__(self, batch: Any) -> Any:
        """
        :param batch: what the loss takes
        :return: what the loss returns
        """
        if self.compiles:
            try:
                with _eager_backward() if self.is_first else nullcontext():
                    result = self.run(batch)
                self.is_first = False
                return result
            except (th._dynamo.exc.TorchDynamoException, th._inductor.exc.InductorError) as error:
                self.compiles = False
                cause = f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:2])}"
                warnings.warn(
                    f"compile=True: {getattr(self.plain, '__name__', 'the loss')} could not be compiled and runs uncompiled "
                    f"({cause}). On a CPU, PyTorch's compiler needs a C++ compiler such as g++.",
                    stacklevel=2,
                )
        return self.plain(batch)


def _eager_backward() -> AbstractContextManager[Any]:
    """Compile the backward pass with the forward pass, where a failure can be answered, not in ``backward()``."""
    if not hasattr(th._functorch.config, "force_non_lazy_backward_lowering"):
        return nullcontext()
    patch: AbstractContextManager[Any] = th._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


def _with_own_code(method: Any) -> Any:
    """
    A copy of a method with a code object of its own.

    PyTorch keeps what it compiled by code object and gives up after a few versions; with a shared one, the models of one
    process (seeds, algorithms) would count as versions of each other.
    """
    if not isinstance(method, types.MethodType):
        return method
    function = method.__func__
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(copy, method.__self__)
