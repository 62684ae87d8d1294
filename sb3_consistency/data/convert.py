"""``python -m sb3_consistency convert SOURCE DATASET_ID``: any dataset that is read becomes a Minari dataset."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from tqdm.auto import tqdm

from sb3_consistency.data.checks import DatasetError, Observations, map_observations
from sb3_consistency.data.episodes import Episode, EpisodeSource
from sb3_consistency.data.formats.minari import NO_REWARDS, check_new_dataset_id, writing_dataset
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.envs.spaces import action_bounds
from sb3_consistency.registry import how_to_install

if TYPE_CHECKING:
    import minari


def convert_dataset(
    dataset: Any, dataset_id: str, *, env: Any = None, overwrite: bool = False, progress_bar: bool = False
) -> minari.MinariDataset:
    """
    Write a dataset as a local Minari dataset, and read it back to compare.

    :param dataset: one dataset, as ``load_dataset`` takes it
    :param dataset_id: id of the new dataset, like "mine/hopper/medium-v0"
    :param env: environment (or its id) that it was recorded in, if the dataset does not name it; gives the bounds of actions
    :param overwrite: replace a local dataset of this id, which may be the one that is read, once the new one is complete
    :param progress_bar: show a progress bar
    :return: the Minari dataset
    :raises ImportError: if Minari is not installed
    :raises DatasetError: if the id is no Minari id or exists, the action bounds are not known, the environment is another, or
        what was written differs
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"Converting needs Minari: {how_to_install('offline')}.") from error
    check_new_dataset_id(dataset_id, overwrite)
    source = open_dataset(dataset)
    named = _named(source, env)
    with (
        warnings.catch_warnings(),
        tqdm(total=int(source.lengths.sum()), unit="step", disable=not progress_bar) as bar,
        writing_dataset(dataset_id, overwrite) as unfinished,
    ):
        # Minari asks for an author, an e-mail address and a permalink
        warnings.filterwarnings("ignore", message=".*(is set to None|no environment spec).*", category=UserWarning)
        written = minari.create_dataset_from_buffers(
            unfinished,
            _buffers(source, named["action_space"], bar),
            **named,
            description=f"Converted from {source.name}.",
            jpeg_encoding=False,
        )
        if source.reference_returns is not None:
            names = ("ref_min_score", "ref_max_score")
            written.storage.update_metadata(dict(zip(names, source.reference_returns, strict=True)))
        if not source.has_rewards:
            written.storage.update_metadata({NO_REWARDS: True})
        _compare(source, open_dataset(unfinished), named["action_space"])
    return minari.load_dataset(dataset_id)


def _named(source: EpisodeSource, env: Any) -> dict[str, Any]:
    """Environment and spaces of the new dataset."""
    import gymnasium as gym

    env = gym.make(env) if isinstance(env, str) else env
    action_space = source.action_space if env is None or "action_space" not in source.inferred else env.action_space
    if env is not None and action_space is None:
        action_space = env.action_space
    if not isinstance(action_space, spaces.Box) or source.observation_space is None:
        raise DatasetError(f"{source.name} does not tell its action bounds: pass the environment (--env).")
    first = next(iter(source.episodes([0])))
    if first.actions.shape[1:] != action_space.shape:
        raise DatasetError(
            f"{source.name}: its actions have shape {first.actions.shape[1:]}, the environment's {action_space.shape}: is it "
            "another environment?"
        )
    if env is not None and not _same_shapes(source.observation_space, env.observation_space):
        raise DatasetError(
            f"{source.name}: its observations are in {source.observation_space}, the environment's in "
            f"{env.observation_space}: is it another environment?"
        )
    named: dict[str, Any] = {"observation_space": source.observation_space, "action_space": action_space}
    spec = env.spec if env is not None else source.env_spec
    return named if spec is None else {**named, "env": env if env is not None else spec}


def _same_shapes(a: spaces.Space, b: spaces.Space) -> bool:
    if isinstance(a, spaces.Dict) and isinstance(b, spaces.Dict):
        return a.keys() == b.keys() and all(_same_shapes(a[key], b[key]) for key in a)
    return a.shape == b.shape


def _unscaled(source: EpisodeSource, episode: Episode, space: spaces.Box) -> np.ndarray:
    if not source.scaled_actions:
        return episode.actions
    bounds = action_bounds(space)
    return (bounds.middle + bounds.half_range * episode.actions).astype(space.dtype)


def _buffers(source: EpisodeSource, space: spaces.Box, bar: Any) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    for episode in source.episodes(range(len(source.lengths))):
        yield EpisodeBuffer(
            observations=map_observations(_with_last, episode.observations, episode.next_observations),
            actions=_unscaled(source, episode, space),
            rewards=np.asarray(episode.rewards),
            terminations=np.asarray(episode.terminations),
            truncations=np.asarray(episode.truncations),
        )
        bar.update(len(episode))


def _with_last(observations: np.ndarray, following: np.ndarray) -> np.ndarray:
    """T + 1 observations, as Minari stores them."""
    return np.concatenate([observations, following[-1:]])


def _compare(source: EpisodeSource, written: EpisodeSource, space: spaces.Box) -> None:
    numbers = range(len(source.lengths))
    if not np.array_equal(source.lengths, written.lengths):
        raise DatasetError(f"{source.name}: the dataset that was written has other lengths of episodes.")
    for number, a, b in zip(numbers, source.episodes(numbers), written.episodes(numbers), strict=True):
        pairs = {"actions": (_unscaled(source, a, space), b.actions)}
        for key in ("observations", "next_observations", "rewards", "terminations", "truncations"):
            pairs[key] = (getattr(a, key), getattr(b, key))
        for key, (ours, theirs) in pairs.items():
            if not _same(ours, theirs):
                raise DatasetError(f"{source.name}, episode {number}: {key} read back from the Minari dataset differ.")


def _same(a: Observations, b: Observations) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a.shape == b.shape and np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), equal_nan=True)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """
    :param commands: sub-commands to add ``convert`` to
    """
    parser = commands.add_parser("convert", help="write a dataset of any format that is read as a Minari dataset")
    parser.add_argument("source", help="a file or a folder, with a prefix where it is not recognised: d4rl:<path>")
    parser.add_argument("dataset_id", help="id of the new dataset, like mine/hopper/medium-v0")
    parser.add_argument("--env", help="id of the environment that it was recorded in, if the dataset does not name it")
    parser.add_argument("--overwrite", action="store_true", help="replace a local dataset of this id")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """
    Run the ``convert`` command.

    :param args: its arguments
    """
    from sb3_consistency.envs.wrappers import make_known

    if args.env:
        make_known(args.env)
    dataset = convert_dataset(args.source, args.dataset_id, env=args.env, overwrite=args.overwrite, progress_bar=True)
    print(f"Wrote {dataset.total_steps} steps, {dataset.total_episodes} episodes, read back and compared: {args.dataset_id}")
