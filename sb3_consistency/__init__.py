"""One-step generative policies for Stable-Baselines3."""

from typing import TYPE_CHECKING, Any

from sb3_consistency.registry import public as _public

if TYPE_CHECKING:
    from sb3_consistency.algorithms.consistency_ac import ConsistencyAC
    from sb3_consistency.algorithms.consistency_bc import ConsistencyBC
    from sb3_consistency.algorithms.cpql import CPQL
    from sb3_consistency.algorithms.diffusion_bc import DiffusionBC
    from sb3_consistency.algorithms.diffusion_ql import DiffusionQL
    from sb3_consistency.algorithms.ractd import RACTD
    from sb3_consistency.data.checks import DatasetError
    from sb3_consistency.data.frames import FrameReplayBuffer
    from sb3_consistency.data.opening import open_dataset, register_dataset
    from sb3_consistency.data.record import model_controller, record_dataset, swing_up
    from sb3_consistency.data.safe_state import load_vec_normalize, save_vec_normalize
    from sb3_consistency.envs.spaces import UnsupportedSpaceError, fitting_policy
    from sb3_consistency.envs.state import CapturableEnv, CheckpointError
    from sb3_consistency.envs.wrappers import FlattenNestedDict, SpacesOnlyEnv, make_env
    from sb3_consistency.files.safe import SafeLoadError, load_safe
    from sb3_consistency.files.zip import ModelFileError
    from sb3_consistency.generative.networks import Mish
    from sb3_consistency.options import option
    from sb3_consistency.registry import find_algorithm
    from sb3_consistency.resume.callback import ResumableCheckpointCallback, load_latest
    from sb3_consistency.training.fitted_q_evaluation import FittedQEvaluationCallback, fitted_q_evaluation
    from sb3_consistency.training.scores import normalized_score
    from sb3_consistency.training.updater import DivergenceError

__version__ = "0.1.0"

__all__ = [
    "CPQL",
    "RACTD",
    "CapturableEnv",
    "CheckpointError",
    "ConsistencyAC",
    "ConsistencyBC",
    "DatasetError",
    "DiffusionBC",
    "DiffusionQL",
    "DivergenceError",
    "FittedQEvaluationCallback",
    "FlattenNestedDict",
    "FrameReplayBuffer",
    "Mish",
    "ModelFileError",
    "ResumableCheckpointCallback",
    "SafeLoadError",
    "SpacesOnlyEnv",
    "UnsupportedSpaceError",
    "__version__",
    "find_algorithm",
    "fitted_q_evaluation",
    "fitting_policy",
    "load_latest",
    "load_safe",
    "load_vec_normalize",
    "make_env",
    "model_controller",
    "normalized_score",
    "open_dataset",
    "option",
    "record_dataset",
    "register_dataset",
    "save_vec_normalize",
    "swing_up",
]


def __getattr__(name: str) -> Any:
    # on first use: importing the package alone, for its version say, must not import PyTorch
    return _public(name)


def __dir__() -> list[str]:
    return __all__
