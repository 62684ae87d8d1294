"""A limit on the memory of new tensors."""

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class AllocationLimit(TorchDispatchMode):
    """Lets new tensors have so many elements in all, and raises ``ValueError`` before the one that exceeds them."""

    def __init__(self, n_elements: int) -> None:
        super().__init__()
        self.n_left = n_elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], (list, tuple)) and all(isinstance(n, int) for n in args[0]):
            self.n_left -= math.prod(args[0])
            if self.n_left < 0:
                raise ValueError("its networks are larger than the weights in the file")
        return func(*args, **(kwargs or {}))
