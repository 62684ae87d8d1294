"""What changes the speed of a gradient step and nothing else: compilation and reduced precision."""

import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import TensorDict

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


class Compiled:
    """
    A function that is compiled at its first call, and whenever a size is new (``torch.compile``).

    Its random numbers are those of the uncompiled function. Where compiling fails (no C++ compiler, say), it runs uncompiled,
    with one warning. Copies and pickles hold the function alone, and compile it anew.

    :param function: function of tensors, or a bound method
    :param name: what the warning calls it
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name, self.compiles = function, name, True
        # random numbers as without compilation, so that both give the same results
        self.compiled = th.compile(_with_own_code(function), dynamic=False, options={"fallback_random": True})
        self.settings = _trace_gradients()

    def __call__(self, *args: Any) -> Any:
        if self.compiles:
            try:
                with self.settings:
                    return self.compiled(*args)
            except (th._dynamo.exc.TorchDynamoException, th._inductor.exc.InductorError) as error:
                self.compiles = False
                cause = f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:2])}"
                warnings.warn(
                    f"compile=True: {self.name} could not be compiled and runs uncompiled "
                    f"({cause}). On a CPU, PyTorch's compiler needs a C++ compiler such as g++.",
                    stacklevel=2,
                )
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self.function, self.name)


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


def _trace_gradients() -> AbstractContextManager[Any]:
    """Let the compiler see through ``torch.autograd.grad``; one that can't compiles what is before and after it."""
    if not hasattr(th._dynamo.config, "trace_autograd_ops"):
        return nullcontext()
    patch: AbstractContextManager[Any] = th._dynamo.config.patch(trace_autograd_ops=True)
    return patch


def _with_own_code(function: Any) -> Any:
    """
    A copy of a function with a code object of its own.

    PyTorch keeps what it compiled by code object and gives up after a few versions; with a shared one, the models of one
    process (seeds, algorithms) would count as versions of each other.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(_with_own_code(function.__func__), function.__self__)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
