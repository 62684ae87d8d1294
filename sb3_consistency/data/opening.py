"""Open a dataset, whatever it is given as: an id, a path, arrays, a buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from inspect import Parameter, signature
from typing import Any

from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.episodes import EpisodeSource
from sb3_consistency.data.mapping import read_mapping
from sb3_consistency.data.recognise import recognise
from sb3_consistency.envs.spaces import channels_first_space, flat_space

#: takes a path, and options as texts by keyword; gives the episodes or a mapping of arrays
Opener = Callable[..., EpisodeSource | Mapping[str, Any]]
#: prefix -> reader in ``formats``, as module and function
BUILT_IN = {
    "minari": ("minari", "open_minari_dataset"),
    "npz": ("npz", "open_npz_file"),
    "buffer": ("replay_buffer", "open_buffer"),
    "d4rl": ("d4rl", "open_d4rl"),
    "ogbench": ("ogbench", "open_ogbench"),
    "robomimic": ("robomimic", "open_robomimic"),
    "lerobot": ("lerobot", "open_lerobot"),
    "d3rlpy": ("d3rlpy", "open_d3rlpy"),
    "imitation": ("imitation", "open_imitation"),
    "zarr": ("zarr", "open_zarr"),
    "table": ("table", "open_table"),
    "zoo": ("zoo_run", "open_zoo_run"),
}
#: packages that read further formats name their openers here
ENTRY_POINTS = "sb3_consistency.datasets"
_registered: dict[str, Opener] = {}


def register_dataset(prefix: str, opener: Opener) -> None:
    """
    Add a format: a dataset "<prefix>:<path>" is opened by a function of yours, everywhere a dataset is taken.

    A package can do so without being imported, by an entry point ``<prefix> = "<module>:<function>"`` in the group
    ``sb3_consistency.datasets``.

    :param prefix: name of the format, at least two lower-case letters, digits or "_"
    :param opener: called with the path, and with the options of "<prefix>:<path>?<option>=<text>&..." by keyword; returns an
        ``EpisodeSource``, or a mapping of arrays as ``load_dataset`` takes it
    :raises ValueError: if the prefix is taken by this package, or can't be one
    """
    if not (len(prefix) > 1 and prefix.islower() and prefix.replace("_", "").isalnum()):
        raise ValueError(f"prefix must be two or more lower-case letters, digits or '_', got {prefix!r}.")
    if prefix in BUILT_IN:
        raise ValueError(f"prefix: {prefix!r} is read by this package itself; choose another.")
    _registered[prefix] = opener


def open_dataset(dataset: Any) -> EpisodeSource:
    """
    Open a dataset, whatever it is given as.

    :param dataset: a Minari id, a ``minari.MinariDataset``, a mapping of arrays or a pandas DataFrame, an SB3 replay
        buffer, or the path of a file or folder of a known format, with its prefix ("d4rl:/data/hopper.hdf5") or recognised
    :return: its episodes
    :raises DatasetError: if it can't be found or read, or is empty
    """
    if isinstance(dataset, EpisodeSource):
        source = dataset
    elif isinstance(dataset, Mapping):
        source = read_mapping(dataset)
    elif isinstance(dataset, (str, os.PathLike)):
        source = _open_path(os.fspath(dataset))
    elif hasattr(dataset, "iterate_episodes") and hasattr(dataset, "storage"):
        source = _opener("minari", "MinariSource")(dataset)
    elif hasattr(dataset, "dones") and hasattr(dataset, "buffer_size"):
        source = _opener("replay_buffer", "BufferSource")(dataset)
    elif hasattr(dataset, "columns") and hasattr(dataset, "to_numpy"):
        source = _opener("table", "read_frame")(dataset)
    else:
        raise DatasetError(
            f"dataset: can't read {type(dataset).__name__}; pass a Minari id, a MinariDataset, a mapping of arrays, an .npz "
            "file, a ReplayBuffer, a file of save_replay_buffer, another file or folder that docs/data.md names, or a list "
            "of these."
        )
    if len(source.lengths) == 0 or source.lengths.sum() == 0:
        raise DatasetError(f"{source.name} is empty: it has no transitions.")
    return source


def _opener(module: str, function: str) -> Any:
    return getattr(import_module(f"sb3_consistency.data.formats.{module}"), function)


def _find_opener(prefix: str) -> Opener | None:
    if prefix in BUILT_IN:
        return _opener(*BUILT_IN[prefix])
    if prefix in _registered:
        return _registered[prefix]
    found = list(metadata.entry_points(group=ENTRY_POINTS, name=prefix))
    return found[0].load() if found else None


def _open_path(text: str) -> EpisodeSource:
    prefix, _, rest = text.partition(":")
    opener = _find_opener(prefix) if rest and not rest.startswith("//") and len(prefix) > 1 else None
    if opener is None:
        path, options = _split_options(text) if not os.path.exists(text) else (text, {})
        prefix = recognise(path)
        opener = _find_opener(prefix)
        assert opener is not None
    else:
        path, options = _split_options(rest) if not os.path.exists(rest) else (rest, {})
    return _call(opener, prefix, path, options)


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    path, _, query = text.partition("?")
    pairs = [part.partition("=") for part in query.split("&") if part]
    return path, {key: value for key, _, value in pairs}


def _call(opener: Opener, prefix: str, path: str, options: Mapping[str, str]) -> EpisodeSource:
    _check_options(opener, prefix, options)
    try:
        opened = opener(os.path.expanduser(path), **options)
    except (DatasetError, ImportError):
        raise
    except Exception as error:  # whatever the format's library raises on a damaged file
        raise DatasetError(f"dataset: can't read {path} as {prefix!r}: {error!r}.") from error
    return read_mapping(opened, path) if isinstance(opened, Mapping) else opened


def _check_options(opener: Opener, prefix: str, options: Mapping[str, str]) -> None:
    if not options:
        return
    parameters = list(signature(opener).parameters.values())
    known = [parameter.name for parameter in parameters[1:]]
    unknown = sorted(set(options) - set(known))
    if unknown and parameters[-1].kind is not Parameter.VAR_KEYWORD:
        told = f"it has {known}" if known else "it has none"
        raise DatasetError(f"dataset: {prefix!r} has no option {', '.join(map(repr, unknown))}; {told}.")


def open_datasets(dataset: Any) -> list[EpisodeSource]:
    """
    :param dataset: one dataset as :func:`open_dataset` takes it, or a list of them
    :return: the opened datasets
    """
    many = isinstance(dataset, Sequence) and not isinstance(dataset, (str, os.PathLike))
    if many and len(dataset) == 0:
        raise DatasetError("dataset: the list is empty.")
    return [open_dataset(d) for d in dataset] if many else [open_dataset(dataset)]


def dataset_spaces(source: EpisodeSource) -> tuple[spaces.Space, spaces.Box]:
    """
    The spaces that a model without an environment takes from its dataset.

    :param source: the dataset
    :return: observation space as SB3 sees it (flat, channels first), action space
    :raises DatasetError: if the dataset does not tell
    """
    if source.action_space is not None and not isinstance(source.action_space, spaces.Box):
        raise DatasetError(
            f"{source.name} has actions in {source.action_space}: only continuous (Box) actions can be learned."
        )
    if source.observation_space is None or source.action_space is None:
        raise DatasetError(
            f"{source.name} does not tell its action bounds (continuous actions, not all within [-1, 1]): pass env=..., "
            "or add 'action_space' to the mapping."
        )
    return channels_first_space(flat_space(source.observation_space)), source.action_space
