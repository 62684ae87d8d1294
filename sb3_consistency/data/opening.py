"""Open a dataset, whatever it is given as: an id, a path, arrays, a buffer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.episodes import ArraySource, BufferSource, DatasetError, EpisodeSource, MinariSource
from sb3_consistency.envs.spaces import channels_first_space, flat_space
from sb3_consistency.registry import how_to_install

if TYPE_CHECKING:
    import minari


def open_dataset(dataset: Any) -> EpisodeSource:
    """
    Open a dataset, whatever it is given as.

    :param dataset: a Minari id, a ``minari.MinariDataset``, a mapping of arrays or the path of an ``.npz`` file of
        them, an SB3 replay buffer or the path of a file that ``save_replay_buffer`` wrote
    :return: its episodes
    :raises DatasetError: if it can't be found or read, or is empty
    """
    if isinstance(dataset, EpisodeSource):
        source = dataset
    elif isinstance(dataset, Mapping):
        source = ArraySource(dataset)
    elif isinstance(dataset, (str, os.PathLike)):
        source = _open_path(os.fspath(dataset))
    elif hasattr(dataset, "iterate_episodes") and hasattr(dataset, "storage"):
        source = MinariSource(dataset)
    elif hasattr(dataset, "dones") and hasattr(dataset, "buffer_size"):
        source = BufferSource(dataset)
    else:
        raise DatasetError(
            f"dataset: can't read {type(dataset).__name__}; pass a Minari id, a MinariDataset, a mapping of arrays, an .npz "
            "file, a ReplayBuffer, a file of save_replay_buffer, or a list of these."
        )
    if len(source.lengths) == 0 or source.lengths.sum() == 0:
        raise DatasetError(f"{source.name} is empty: it has no transitions.")
    return source


def _open_path(path: str) -> EpisodeSource:
    if path.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return ArraySource(dict(arrays), name=path)
        except DatasetError:
            raise
        except Exception as error:  # zipfile's, zlib's and numpy's errors have no common base
            raise DatasetError(f"dataset: can't read {path}: {error!r}.") from error
    if path.endswith(".pkl"):
        from stable_baselines3.common.save_util import load_from_pkl

        try:
            buffer = load_from_pkl(path)
        except Exception as error:  # unpickling damaged bytes may raise anything
            raise DatasetError(f"dataset: can't read {path} as a replay buffer: {error!r}.") from error
        if not (hasattr(buffer, "dones") and hasattr(buffer, "buffer_size")):
            raise DatasetError(f"dataset: {path} holds a {type(buffer).__name__}, not a replay buffer.")
        return BufferSource(buffer, name=path)
    return MinariSource(open_minari(path))


def is_minari_id(dataset_id: str) -> bool:
    """
    :param dataset_id: a text
    :return: whether it is a Minari id, with its version
    """
    from minari.dataset.minari_dataset import DATASET_ID_RE

    match = DATASET_ID_RE.fullmatch(dataset_id)
    return match is not None and match.group("version") is not None


def open_minari(dataset_id: str) -> minari.MinariDataset:
    """
    Open a local Minari dataset, or download it first.

    :param dataset_id: for example "mujoco/hopper/medium-v0"
    :return: the dataset
    :raises ImportError: if Minari is not installed
    :raises DatasetError: if the id is unknown, the network is not there, or the file is damaged
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            f"Minari is needed to load a dataset by its id: {how_to_install('offline')}. "
            "Arrays, .npz files and replay buffers load without it."
        ) from error
    from minari.storage.datasets_root_dir import get_dataset_path

    if not is_minari_id(dataset_id):
        raise DatasetError(
            f"dataset: {dataset_id!r} is neither a Minari id (like 'mujoco/hopper/medium-v0', with the version) nor the path "
            "of an .npz or .pkl file."
        )
    path = get_dataset_path(dataset_id)
    local = (path / "data").exists()
    try:
        return minari.load_dataset(dataset_id, download=not local)
    except Exception as error:  # network errors come from whatever HTTP library the hub client uses
        if local:
            raise DatasetError(f"dataset: {path} is damaged: {error!r}. Delete and fetch or record it again.") from error
        root = get_dataset_path()
        # by their folders: Minari's own list fails if anything else lies among them
        ids = [folder.parent.relative_to(root).as_posix() for folder in root.glob("**/data")]
        known = sorted(filter(is_minari_id, ids))
        raise DatasetError(
            f"dataset: {dataset_id!r} is not in {root} (MINARI_DATASETS_PATH), which has {known}, and could "
            f"not be downloaded: {error!r}. Check the spelling and the network."
        ) from error


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
    if source.observation_space is None or not isinstance(source.action_space, spaces.Box):
        raise DatasetError(
            f"{source.name} does not tell its action bounds (continuous actions, not all within [-1, 1]): pass env=..., "
            "or add 'action_space' to the mapping."
        )
    return channels_first_space(flat_space(source.observation_space)), source.action_space
