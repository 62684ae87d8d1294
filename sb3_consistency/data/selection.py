"""Which episodes of a dataset are loaded, and which are held out."""

from __future__ import annotations

import numpy as np

from sb3_consistency.data.episodes import DatasetError, EpisodeSource


def select_episodes(
    source: EpisodeSource, episodes: slice | np.ndarray | None = None, top_fraction: float = 1.0
) -> np.ndarray:
    """
    Numbers of the episodes to load, ascending.

    :param source: the dataset
    :param episodes: a slice of the episodes, or their numbers; all when None
    :param top_fraction: the share of (the remaining) episodes with the highest returns, in (0, 1]
    :return: episode numbers
    :raises DatasetError: if nothing remains, or ``top_fraction`` asks for returns that were not recorded
    """
    chosen = np.arange(len(source.lengths))
    if episodes is not None:
        try:
            # a boolean mask selects too
            chosen = np.unique(chosen[episodes if isinstance(episodes, slice) else np.asarray(episodes)])
        except IndexError as error:
            raise DatasetError(f"episodes={episodes!r}: {source.name} has {len(source.lengths)} episodes.") from error
    chosen = chosen[source.lengths[chosen] > 0]
    if top_fraction < 1:
        source.require_rewards(f"top_fraction={top_fraction}")
        n_best = max(1, round(top_fraction * len(chosen)))
        chosen = np.sort(chosen[np.argsort(-source.returns[chosen], kind="stable")[:n_best]])
    if len(chosen) == 0:
        raise DatasetError(f"{source.name}: the filter (episodes={episodes!r}) leaves no episode.")
    return chosen


def hold_out(episodes: np.ndarray, fraction: float) -> np.ndarray:
    """
    :param episodes: episode numbers
    :param fraction: share of them to hold out; a positive one holds out at least one
    :return: evenly spaced ones of them
    """
    if fraction == 0:
        return episodes[:0]
    n_held = max(1, round(fraction * len(episodes)))
    return episodes[np.arange(n_held) * len(episodes) // n_held]
