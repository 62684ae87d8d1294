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
    from sb3_consistency.common.checkpoint import CheckpointError
    from sb3_consistency.common.env_state import CapturableEnv
    from sb3_consistency.common.resume import ResumableCheckpointCallback, load_latest
    from sb3_consistency.common.training import DivergenceError
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
# what is no algorithm
_TOOLS = {
    "CapturableEnv": "common.env_state",
    "CheckpointError": "common.checkpoint",
    "DivergenceError": "common.training",
    "ResumableCheckpointCallback": "common.resume",
    "load_latest": "common.resume",
    "load_safe": "safe",
}

__all__ = [
    "CPQL",
    "RACTD",
    "CapturableEnv",
    "CheckpointError",
    "ConsistencyAC",
    "ConsistencyBC",
    "DiffusionBC",
    "DiffusionQL",
    "DivergenceError",
    "ResumableCheckpointCallback",
    "__version__",
    "load_latest",
    "load_safe",
]


def __getattr__(name: str) -> Any:
    # on first use: importing the package alone, for its version say, must not import PyTorch
    if name in _MODULES:
        return getattr(import_module(f"sb3_consistency.algorithms.{_MODULES[name]}"), name)
    if name in _TOOLS:
        return getattr(import_module(f"sb3_consistency.{_TOOLS[name]}"), name)
    raise AttributeError(f"module 'sb3_consistency' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
