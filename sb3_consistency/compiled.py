"""Functions that PyTorch compiles, if it can."""

import os
import shutil
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th


def can_compile(device: th.device) -> bool:
    """
    :param device: where tensors are
    :return: whether compiling can be expected to work: on a CPU it needs a C++ compiler
    """
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


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
