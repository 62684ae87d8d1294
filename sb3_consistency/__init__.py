"""One-step generative policies for Stable-Baselines3."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_consistency.algorithms.consistency_ac import ConsistencyAC
    from sb3_consistency.algorithms.consistency_bc import ConsistencyBC
    from sb3_consistency.algorithms.cpql import CPQL
    from sb3_consistency.algorithms.diffusion_bc import DiffusionBC
    from sb3_consistency.algorithms.diffusion_ql import DiffusionQL
    from sb3_consistency.algorithms.ractd import RACTD
    from sb3_consistency.safe import load_safe

__version__ = "0.1.0"

_MODULES = {
    "CPQL": "cpql",
    "RACTD": "ractd",
    "ConsistencyAC": "consistency_ac",
    "ConsistencyBC": "consistency_bc",
    "DiffusionBC": "diffusion_bc",
    "DiffusionQL": "diffusion_ql",
}

__all__ = ["CPQL", "RACTD", "ConsistencyAC", "ConsistencyBC", "DiffusionBC", "DiffusionQL", "__version__", "load_safe"]


def __getattr__(name: str) -> Any:
    # on first use: importing the package alone, for its version say, must not import PyTorch
    if name in _MODULES:
        return getattr(import_module(f"sb3_consistency.algorithms.{_MODULES[name]}"), name)
    if name == "load_safe":
        return import_module("sb3_consistency.safe").load_safe
    raise AttributeError(f"module 'sb3_consistency' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
