"""Names: where everything public lives, imported only when it is used, and what colour an algorithm has in every picture."""

import re
from importlib import import_module
from typing import Any

#: name of every algorithm's class -> its module in ``algorithms``, which is also its key in the zoo
ALGORITHMS = {
    "CPQL": "cpql",
    "RACTD": "ractd",
    "ConsistencyAC": "consistency_ac",
    "ConsistencyBC": "consistency_bc",
    "DiffusionBC": "diffusion_bc",
    "DiffusionQL": "diffusion_ql",
}
#: other public name -> its module
TOOLS = {
    "CapturableEnv": "envs.state",
    "CheckpointError": "envs.state",
    "DatasetError": "data.checks",
    "DivergenceError": "training.updater",
    "FittedQEvaluationCallback": "training.fitted_q_evaluation",
    "FlattenNestedDict": "envs.wrappers",
    "FrameReplayBuffer": "data.frames",
    "Mish": "generative.networks",
    "ModelFileError": "files.zip",
    "ResumableCheckpointCallback": "resume.callback",
    "SafeLoadError": "files.safe",
    "SpacesOnlyEnv": "envs.wrappers",
    "UnsupportedSpaceError": "envs.spaces",
    "find_algorithm": "registry",
    "fitted_q_evaluation": "training.fitted_q_evaluation",
    "fitting_policy": "envs.spaces",
    "load_latest": "resume.callback",
    "load_safe": "files.safe",
    "load_vec_normalize": "data.safe_state",
    "make_env": "envs.wrappers",
    "model_controller": "data.record",
    "normalized_score": "training.scores",
    "open_dataset": "data.opening",
    "option": "options",
    "record_dataset": "data.record",
    "register_dataset": "data.opening",
    "save_vec_normalize": "data.safe_state",
    "swing_up": "data.record",
}
#: algorithm -> its colour in every picture: Okabe and Ito's palette, which colour-blind readers can tell apart, for this
#: package and SB3; the peers get what is left
COLOURS = {
    "CPQL": "#d55e00",
    "ConsistencyAC": "#0072b2",
    "ConsistencyBC": "#56b4e9",
    "DiffusionQL": "#009e73",
    "DiffusionBC": "#b8a800",
    "RACTD": "#cc79a7",
    "SAC": "#000000",
    "LayerNormSAC": "#7f7f7f",
    "TD3": "#8c564b",
    "TQC": "#e69f00",
    "sbx:SAC": "#a0a0a0",
    "d3rlpy:TD3PlusBC": "#7b3294",
    "d3rlpy:IQL": "#b2182b",
    "d3rlpy:ReBRAC": "#1a1a8c",
}
OTHER = "#606060"


def algorithm(name: str) -> type[Any]:
    """
    :param name: one of :data:`ALGORITHMS`
    :return: the class
    :raises KeyError: if there is none of this name
    """
    cls: type[Any] = getattr(import_module(f"sb3_consistency.algorithms.{ALGORITHMS[name]}"), name)
    return cls


def public(name: str) -> Any:
    """
    :param name: a public name
    :return: what it stands for
    :raises AttributeError: if there is none of this name
    """
    if name in ALGORITHMS:
        return algorithm(name)
    if name in TOOLS:
        return getattr(import_module(f"sb3_consistency.{TOOLS[name]}"), name)
    raise AttributeError(f"module 'sb3_consistency' has no attribute {name!r}")


def find_algorithm(name: str, *more: type[Any]) -> type[Any]:
    """
    :param name: name of an algorithm of this package, SB3 or sb3-contrib, in any case ("cpql", "SAC", "tqc")
    :param more: further classes that it may be
    :return: its class
    :raises ValueError: if there is none of this name
    """
    known: dict[str, Any] = {
        key.lower(): getattr(package, key)
        for package in map(import_module, ("stable_baselines3", "sb3_contrib"))
        for key in vars(package)
        if key[:1].isupper() and key != "HerReplayBuffer"
    } | {cls.__name__.lower(): cls for cls in more}
    ours = {key.lower(): key for key in ALGORITHMS}
    wanted = name.lower().replace("_", "")
    if wanted in ours:
        return algorithm(ours[wanted])
    if wanted not in known:
        raise ValueError(f"algo: {name!r} is none of {sorted({*known, *ours})}.")
    cls: type[Any] = known[wanted]
    return cls


def how_to_install(extra: str) -> str:
    """
    :param extra: name of an extra of this package
    :return: how to install what it brings, from a package index or in a checkout
    """
    return f'pip install "sb3-consistency[{extra}]", or in a checkout: pip install -e ".[{extra}]"'


def colour_of(label: str) -> str:
    """
    :param label: an algorithm, and whatever comes after it
    :return: its colour
    """
    match = re.match(r"[\w:]+", label)
    return COLOURS.get(match[0] if match else "", OTHER)
