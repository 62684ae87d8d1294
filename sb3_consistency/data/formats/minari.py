"""Minari datasets: by id (local, or downloaded), or in a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_consistency.data.checks import DatasetError, as_flags, as_numbers, check_lengths, map_observations
from sb3_consistency.data.episodes import Episode, EpisodeSource
from sb3_consistency.envs.wrappers import make_known
from sb3_consistency.registry import how_to_install

if TYPE_CHECKING:
    import gymnasium as gym
    import minari

#: metadata of a dataset that was converted from one without rewards
NO_REWARDS = "sb3_consistency_no_rewards"
ARRAY_KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
D4RL_TASKS = ("hopper", "halfcheetah", "walker2d", "ant", "antmaze", "maze2d", "kitchen", "pen", "door", "hammer", "relocate")
#: where Minari fetches from, instead of what MINARI_REMOTE says: "hf://<organisation>/<id>", "gcp://<bucket>/<id>"
REMOTES = ("hf://", "gcp://")


class MinariSource(EpisodeSource):
    """
    Episodes of a Minari dataset.

    :param dataset: the dataset
    """

    def __init__(self, dataset: minari.MinariDataset) -> None:
        super().__init__(f"dataset {dataset.id}")
        self.dataset = dataset
        self.observation_space = dataset.observation_space
        self.action_space = dataset.action_space
        self.env_spec = dataset.env_spec
        self.has_rewards = not dataset.storage.metadata.get(NO_REWARDS, False)
        low, high = (dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score"))
        if low is not None and high is not None:
            self.reference_returns = (float(low), float(high))

    @cached_property
    def _metadata(self) -> list[dict[str, Any]]:
        try:
            return [dict(m) for m in self.dataset.storage.get_episode_metadata(self.dataset.episode_indices)]
        except Exception as error:  # whatever the storage's library raises on a damaged file
            raise DatasetError(f"{self.name} is damaged: {error!r}. Delete and fetch or record it again.") from error

    @cached_property
    def _stated_lengths(self) -> np.ndarray:
        try:
            return np.array([int(m["total_steps"]) for m in self._metadata], dtype=np.int64)
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.name} is damaged: an episode does not tell its total_steps: {error!r}.") from error

    @cached_property
    def lengths(self) -> np.ndarray:
        for _ in self.episodes(np.flatnonzero(self._stated_lengths < 1)):
            pass  # reading one compares its number of steps, which would else be left out unread
        return self._stated_lengths

    @cached_property
    def returns(self) -> np.ndarray:
        if all("rewards_sum" in m for m in self._metadata):
            return np.array([float(m["rewards_sum"]) for m in self._metadata])
        return np.array([float(e.rewards.sum()) for e in self.episodes(range(len(self.lengths)))])

    def episodes(self, indices: Iterable[int]) -> Iterator[Episode]:
        indices = list(indices)
        stream = iter(self.dataset.storage.get_episodes(self.dataset.episode_indices[indices]))
        for index in indices:
            try:
                data = next(stream)
            except Exception as error:  # as above
                raise DatasetError(f"{self.name}, episode {index} is damaged: {error!r}.") from error
            yield self._checked(index, data)

    def _checked(self, index: int, data: Mapping[str, Any]) -> Episode:
        where = f"{self.name}, episode {index}"
        missing = [key for key in ARRAY_KEYS if key not in data]
        if missing:
            raise DatasetError(f"{where} is damaged: it has no {missing}.")
        arrays = {key: as_numbers(f"{where}: {key}", data[key]) for key in ("actions", "rewards")}
        flags = {key: as_flags(f"{where}: {key}", data[key]) for key in ("terminations", "truncations")}
        observations = map_observations(lambda x: as_numbers(f"{where}: observations", x), data["observations"])
        n_steps = check_lengths(self.name, index, {"observations": observations, **arrays, **flags})
        if n_steps != self._stated_lengths[index]:
            raise DatasetError(f"{where} is damaged: it has {n_steps} steps, its metadata says {self._stated_lengths[index]}.")
        return Episode(
            observations=map_observations(lambda x: x[:-1], observations),
            next_observations=map_observations(lambda x: x[1:], observations),
            **arrays,
            **flags,
        )

    @property
    def env_specs(self) -> list[Any]:
        """Of the environments that the dataset names: the one it was recorded in, and the one meant for evaluation."""
        return [spec for spec in (self.env_spec, getattr(self.dataset, "_eval_env_spec", None)) if spec is not None]

    def make_env(self, eval_env: bool = True) -> gym.Env:
        if self.env_spec is None:
            return super().make_env()
        make_known(self.env_spec.id)
        try:
            return self.dataset.recover_environment(eval_env=eval_env)
        except Exception as error:  # gymnasium.error.*, or the ImportError of a missing simulator
            raise DatasetError(
                f"The environment of {self.name} ({self.env_spec.id}) can't be made: {error!r}. "
                "Install what it needs, or pass env=..."
            ) from error


def is_minari_id(dataset_id: str) -> bool:
    """
    :param dataset_id: a text
    :return: whether it is a Minari id, with its version
    """
    from minari.dataset.minari_dataset import DATASET_ID_RE

    match = DATASET_ID_RE.fullmatch(dataset_id)
    return match is not None and match.group("version") is not None


def check_new_dataset_id(dataset_id: str, overwrite: bool) -> None:
    """
    :param dataset_id: id that a new local dataset is to have
    :param overwrite: whether it may replace one of this id
    :raises DatasetError: if the id is no Minari id, exists and ``overwrite`` is not set, or is the name of a folder of others
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    if not is_minari_id(dataset_id):
        raise DatasetError(
            f"dataset_id: {dataset_id!r} is no Minari id: pass one like 'mine/hopper/medium-v0', with the version."
        )
    path = get_dataset_path(dataset_id)
    if (path / "data").exists():
        if not overwrite:
            raise DatasetError(f"dataset_id: {dataset_id!r} exists in {get_dataset_path()}; choose another, or overwrite it.")
    elif path.exists() and any(path.iterdir()):
        raise DatasetError(f"dataset_id: {path} is a folder that holds no dataset but other things; choose another id.")


@contextmanager
def writing_dataset(dataset_id: str, overwrite: bool) -> Iterator[str]:
    """
    Write a local dataset under another id. Once it is complete it gets its own, in the place of one that has it; if anything
    fails that one stays.

    :param dataset_id: id of the new dataset
    :param overwrite: whether it may replace one of this id
    :return: the id to write it under
    :raises DatasetError: if there is one by now, and ``overwrite`` is not set
    """
    from minari.storage.datasets_root_dir import get_dataset_path

    name, _, version = dataset_id.rpartition("-v")
    unfinished = f"{name}-unfinished-{uuid.uuid4().hex[:8]}-v{version}"
    path, target = get_dataset_path(unfinished), get_dataset_path(dataset_id)
    former = path.with_name(f"{path.name}-former")
    try:
        yield unfinished
        metadata = path / "data" / "metadata.json"
        metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "dataset_id": dataset_id}))
        check_new_dataset_id(dataset_id, overwrite)
        if target.exists():
            os.replace(target, former)
        try:
            os.replace(path, target)
        except OSError:
            if former.exists():
                os.replace(former, target)
            raise
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def is_minari_folder(path: str) -> bool:
    """
    :param path: path of a folder
    :return: whether it is one that Minari wrote: "data" of a dataset, or the folder above
    """
    return any(os.path.isfile(os.path.join(path, part, "metadata.json")) for part in ("", "data")) and not os.path.isdir(
        os.path.join(path, "meta")
    )


def open_folder(path: str) -> MinariSource:
    """
    :param path: folder of a Minari dataset
    :return: its episodes
    :raises DatasetError: if it can't be read
    """
    _import_minari()
    import minari

    inner = os.path.join(path, "data")
    try:
        return MinariSource(minari.MinariDataset(inner if os.path.isdir(inner) else path))
    except ImportError:
        raise
    except Exception as error:  # whatever the storage's library raises on a damaged file
        raise DatasetError(f"dataset: can't read {path} as a Minari dataset: {error!r}.") from error


def open_minari_dataset(path: str) -> MinariSource:
    """
    :param path: folder of a Minari dataset, or an id as for :func:`open_minari`
    :return: its episodes
    """
    return open_folder(path) if is_minari_folder(path) else MinariSource(open_minari(path))


def _check_network(where: str) -> None:
    """
    Ask for the host's address once: the client of the hub would try five times, for half a minute.

    :raises OSError: if it has none
    """
    remote = where if where.startswith(REMOTES) else os.environ.get("MINARI_REMOTE", "hf://")
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if remote.startswith("hf://") and not proxied:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, None)


def _without_remote(dataset_id: str) -> str:
    if not dataset_id.startswith(REMOTES):
        return dataset_id
    return dataset_id.split("://", 1)[1].partition("/")[2]


def minari_name(name: str) -> str | None:
    """
    :param name: name of a dataset
    :return: Minari's id of the successor, if it is one of D4RL's names ("hopper-medium-v2"), else None
    """
    match = re.fullmatch(r"([a-z0-9]+)-([\w-]+)-v\d", name)
    task, kind = match.groups() if match else ("", "")
    if task not in D4RL_TASKS:
        return None
    if task in D4RL_TASKS[:4]:
        return f"mujoco/{task}/{kind.split('-')[0]}-v0"
    return f"D4RL/{'pointmaze' if task == 'maze2d' else task}/{kind.replace('-dense', '')}-v{1 if task == 'antmaze' else 2}"


def _import_minari() -> None:
    try:
        import minari  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Minari is needed to load a dataset by its id: {how_to_install('offline')}. "
            "Arrays, .npz files and replay buffers load without it."
        ) from error


def open_minari(dataset_id: str) -> minari.MinariDataset:
    """
    Open a local Minari dataset, or download it first.

    :param dataset_id: for example "mujoco/hopper/medium-v0", from where MINARI_REMOTE says; or with the place in front:
        "hf://farama-minari/mujoco/hopper/medium-v0"
    :return: the dataset
    :raises ImportError: if Minari is not installed
    :raises DatasetError: if the id is unknown, the network is not there, or the file is damaged
    """
    _import_minari()
    import minari
    from minari.storage import hosting
    from minari.storage.datasets_root_dir import get_dataset_path

    where, dataset_id = dataset_id, _without_remote(dataset_id)
    if not is_minari_id(dataset_id):
        raise DatasetError(
            f"dataset: {dataset_id!r} is neither a Minari id (like 'mujoco/hopper/medium-v0', with the version) nor the path "
            "of a file or folder that is there and recognised; a prefix says what a file is, as in 'd4rl:/data/hopper.hdf5'."
        )
    try:
        path = get_dataset_path(dataset_id)
    except OSError as error:
        raise DatasetError(
            f"dataset: Minari can't make the folder of its datasets ({error}): set MINARI_DATASETS_PATH to another."
        ) from error
    local = (path / "data").exists()
    if not local and minari_name(dataset_id) is not None:
        raise DatasetError(
            f"dataset: {dataset_id!r} is D4RL's name: Minari's is {minari_name(dataset_id)!r}; a file of D4RL opens as "
            f"'d4rl:<path of {dataset_id}.hdf5>'."
        )
    try:
        if not local:
            _check_network(where)
            hosting.download_dataset(where)
        return minari.load_dataset(dataset_id)
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
        ) from None  # the retries of the HTTP library fill pages
