"""Make rl-zoo3 know the algorithms of this package."""

import json
import zipfile
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import sb3_consistency
from sb3_consistency import registry

PACKAGE = Path(__file__).parents[1]
#: folder for what the offline phase writes when an online phase follows: both count their steps from 0
PRETRAIN_FOLDER = "pretrain"


def algorithm_names() -> dict[str, str]:
    """
    :return: key of every algorithm in the zoo (like "consistency_ac") -> name of its class
    """
    return {module: name for name, module in registry.ALGORITHMS.items()}


def canonical(algo: str) -> str:
    """
    :param algo: key of an algorithm, in the zoo's spelling ("consistencyac") or ours ("consistency_ac")
    :return: our spelling, which names the folders; the keys of other algorithms stay as they are
    """
    spellings = {name.lower(): key for key, name in algorithm_names().items()}
    return spellings.get(algo.lower(), algo)


def is_ours(algo: str) -> bool:
    """
    :param algo: key of an algorithm
    :return: whether it is one of this package's
    """
    return canonical(algo) in algorithm_names()


def default_config(algo: str, offline: bool) -> Path:
    """
    :param algo: key of an algorithm of this package
    :param offline: whether for a dataset; else for an environment
    :return: its hyperparameter file, in the installed package or in the checkout; where it has none, the one for all
    """
    installed = PACKAGE / "hyperparams"
    folder = (installed if installed.is_dir() else PACKAGE.parent / "hyperparams") / ("offline" if offline else "")
    path = folder / f"{canonical(algo)}.yml"
    return path if path.is_file() else folder / "default.yml"


class ZooModel:
    """
    Makes and loads models as the zoo's commands need it.

    Tuning makes a model of every trial, where a TypeError would end in a traceback. For SB3's own off-policy algorithms
    ``enjoy``, ``record_video`` and ``push_to_hub`` pass ``buffer_size=1``; all others would get a full replay buffer.

    :raises ValueError: in place of the TypeErrors of the constructor
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def load(cls, path: Any, env: Any = None, buffer_size: int | None = 1, **kwargs: Any) -> Any:
        """
        Load a model; see SB3's ``BaseAlgorithm.load``.

        :param path: file that ``save`` wrote
        :param env: environment
        :param buffer_size: size of the replay buffer; None for the one the model was saved with
        :param kwargs: further arguments of SB3's ``load``
        :return: the model
        """
        parent: Any = super()
        if buffer_size is None:
            return parent.load(path, env, **kwargs)
        model = parent.load(path, env, buffer_size=buffer_size, **kwargs)
        if buffer_size == 1:
            # saved again (push-to-hub does), or trained on, it must not keep a buffer of 1
            model.buffer_size = _saved_buffer_size(path) or buffer_size
        return model

    def learn(self: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Train; see :meth:`GenerativeAlgorithm.learn`.

        :return: the model
        """
        buffer = self.replay_buffer
        if buffer is not None and buffer.size() == 0 and buffer.buffer_size < self.buffer_size // self.n_envs:
            self.replay_buffer = self.new_buffer(self.buffer_size)
        return super().learn(*args, **kwargs)  # type: ignore[misc]

    def save_safe(self: Any, path: str | Path) -> Path:
        """
        Write a file that executes nothing, and names the algorithm itself; see :meth:`GenerativeAlgorithm.save_safe`.

        :return: the path
        """
        model = copy(self)
        model.__class__ = getattr(sb3_consistency, type(self).__name__)
        return cast(Path, model.save_safe(path))


def _saved_buffer_size(path: Any) -> int | None:
    for file in (path, f"{path}.zip"):
        try:
            with zipfile.ZipFile(file) as archive:
                return int(json.loads(archive.read("data"))["buffer_size"])
        except (OSError, zipfile.BadZipFile, KeyError):
            continue
    return None


@cache
def zoo_class(key: str) -> type[Any]:
    """
    :param key: key of an algorithm of this package
    :return: its class with :class:`ZooModel`, under the same name
    """
    cls = getattr(sb3_consistency, algorithm_names()[key])
    return type(cls.__name__, (ZooModel, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def register() -> None:
    """
    Add the algorithms, their hyperparameter files and search spaces to rl-zoo3, and mend what is broken in it.

    After it ``rl_zoo3.train.train()`` and ``rl_zoo3.enjoy.enjoy()`` work as the commands of this package do.

    :raises ImportError: if rl-zoo3 is not installed
    """
    try:
        import rl_zoo3
    except ImportError as error:
        raise ImportError(f"The zoo needs {error.name}: {registry.how_to_install('zoo')}.") from error
    from sb3_consistency.zoo import workarounds

    workarounds.import_load_from_hub()
    import rl_zoo3.enjoy
    import rl_zoo3.exp_manager
    import rl_zoo3.train
    from rl_zoo3 import hyperparams_opt

    from sb3_consistency.zoo.exp_manager import GenerativeExperimentManager
    from sb3_consistency.zoo.parsers import EnjoyParser, TrainParser, use_parser
    from sb3_consistency.zoo.safe_files import read_our_statistics
    from sb3_consistency.zoo.search_spaces import convert, sample

    # changed in place: rl-zoo3's modules share these dicts
    samplers: dict[str, Any] = hyperparams_opt.HYPERPARAMS_SAMPLER
    converters: dict[str, Any] = hyperparams_opt.HYPERPARAMS_CONVERTER
    for key, name in algorithm_names().items():
        for spelling in (key, name.lower()):
            rl_zoo3.ALGOS[spelling] = zoo_class(key)
            samplers[spelling] = partial(sample, zoo_class(key))
            converters[spelling] = convert
    # "policy_kwargs" in YAML files and -params are evaluated in these namespaces
    for module in (rl_zoo3.exp_manager, rl_zoo3.utils):
        vars(module)["sb3_consistency"] = sb3_consistency
    rl_zoo3.train.ExperimentManager = GenerativeExperimentManager  # type: ignore[misc]
    use_parser(rl_zoo3.train, TrainParser)
    use_parser(rl_zoo3.enjoy, EnjoyParser)
    read_our_statistics(rl_zoo3.enjoy)
