"""Plain arrays by name, as one's own scripts, D4RL, OGBench and SB3 call them, and what each name means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError, Observations, as_flags, as_numbers, map_observations
from sb3_consistency.data.flat import FlatSource, breaks

#: our name -> others that mean the same
SYNONYMS = {
    "observations": ("obs", "observation"),
    "actions": ("acts", "action"),
    "rewards": ("reward", "rews", "rew"),
    "next_observations": ("next_observation", "next_obs", "obs_next", "new_obs", "observations_next"),
    "terminations": ("terminated", "termination"),
    "truncations": ("truncated", "truncation", "timeouts", "timeout"),
    "episode": ("episode_id", "episode_index", "episodes"),
}
#: what may be ends of any kind
DONE_KEYS = ("dones", "done")
NEEDED = ("observations", "actions")
OBSERVATION_KEYS = ("observations", "next_observations")
TERMINALS = (
    "{name}: 'terminals' alone can be read in two ways: as D4RL's, steps after which the task is over (then call them "
    "'terminations', and give 'truncations' or 'timeouts', all False if no episode timed out), or as OGBench's, last rows of "
    "recordings (then open it as 'ogbench:<path>', or call them 'truncations')."
)
DONES = (
    "{name}: {key!r} can be read in two ways: as terminations (the task is over) or as ends of episodes (time limits "
    "included). Call them 'terminations' or 'truncations', or give one of these beside them."
)


def read_mapping(arrays: Mapping[str, Any], name: str = "the mapping of arrays", ogbench: bool | None = None) -> FlatSource:
    """
    Cut episodes out of plain arrays.

    An episode ends where ``terminations`` or ``truncations`` is set, where ``episode`` changes, where a row's next
    observation is not the next row's observation (then it counts as truncated), and at the last row.

    :param arrays: ``observations`` and ``actions``, with one row per step; ``rewards`` (not needed to clone behaviour);
        ``terminations`` (needed with rewards); ``truncations``; ``next_observations``, without which they are those of
        the row after, or ``observations`` has one row more for every episode; optionally ``episode`` (its number),
        ``observation_space`` and ``action_space``
    :param name: how messages call the dataset
    :param ogbench: whether ``terminals`` are OGBench's; None to look
    :return: the episodes
    :raises DatasetError: if an array is missing, empty, of another length, or can be read in two ways
    """
    return _Reader(dict(arrays), name, is_ogbench(arrays) if ogbench is None else ogbench).source()


def is_ogbench(arrays: Mapping[str, Any]) -> bool:
    """
    :param arrays: arrays by name
    :return: whether they are OGBench's, whose "terminals" are ends of recordings and whose terminations are "masks" == 0
    """
    raw = "terminals" in arrays and "qpos" in arrays and "rewards" not in arrays and "next_observations" not in arrays
    # D4RL's rows, with or without masks
    has_timeouts = any(key in arrays for key in ("truncations", *SYNONYMS["truncations"]))
    return "terminals" in arrays and not has_timeouts and ("masks" in arrays or "valids" in arrays or raw)


class _Reader:
    """One mapping on its way to a source."""

    def __init__(self, arrays: dict[str, Any], name: str, ogbench: bool) -> None:
        self.name = name
        self.notes: list[str] = []
        arrays = _renamed(arrays, name)
        self.is_ogbench = ogbench
        arrays = self._ogbench(arrays) if self.is_ogbench else self._flags(arrays)
        missing = [key for key in NEEDED if key not in arrays]
        if missing:
            raise DatasetError(f"{name}: missing {missing}, got {sorted(map(str, arrays))}; needed are {list(NEEDED)}.")
        for key in ("observation_space", "action_space"):
            if arrays.get(key) is not None and not isinstance(arrays[key], spaces.Space):
                raise DatasetError(f"{name}: {key} must be a Gymnasium space, got {arrays[key]!r}.")
        self.given = arrays
        known = (*NEEDED, "rewards", "next_observations", "terminations", "truncations", "episode", "last_rows")
        self.arrays = {key: self._array(key, arrays[key]) for key in known if key in arrays}
        self.n_rows = len(self.arrays["actions"])
        if self.n_rows == 0:
            raise DatasetError(f"{name}: no transitions.")

    def _ogbench(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Rows of terminals == 1 (or valids == 0) only hold the last observation, unless next_observations are there."""
        ends = as_flags(f"{self.name}: terminals", arrays.pop("terminals")).reshape(-1)
        if "masks" in arrays:
            arrays["terminations"] = as_flags(f"{self.name}: masks", arrays.pop("masks")).reshape(-1) == 0
        elif "rewards" in arrays:
            arrays["terminations"] = np.zeros(len(ends), bool)
        if "next_observations" in arrays:
            arrays["truncations"] = ends
            return arrays
        if "valids" in arrays:
            ends = ~as_flags(f"{self.name}: valids", arrays.pop("valids")).reshape(-1)
        ends[-1:] = True
        arrays["last_rows"] = ends
        return arrays

    def _flags(self, arrays: dict[str, Any]) -> dict[str, Any]:
        kinds = ("terminations", "truncations")
        for key in DONE_KEYS:
            given = [kind for kind in kinds if kind in arrays]
            if key not in arrays or len(given) == 2:
                continue
            if not given:
                raise DatasetError(DONES.format(name=self.name, key=key))
            done, known = (as_flags(f"{self.name}: {k}", arrays[k]) for k in (key, *given))
            if done.size != known.size:
                raise DatasetError(f"{self.name}: arrays of different lengths: {done.size} {key}, {known.size} {given[0]}.")
            (other,) = set(kinds) - set(given)
            arrays[other] = done.reshape(-1) & ~known.reshape(-1)
        if "terminals" in arrays and "terminations" not in arrays:
            if "truncations" not in arrays and "next_observations" not in arrays:
                raise DatasetError(TERMINALS.format(name=self.name))
            arrays["terminations"] = arrays["terminals"]
        return arrays

    def _array(self, key: str, value: Any) -> Observations:
        convert = as_flags if key in ("terminations", "truncations") else as_numbers
        if isinstance(value, Mapping) and not (key in OBSERVATION_KEYS and value):
            raise DatasetError(f"{self.name}: {key} must be an array, got a dict with the keys {sorted(map(str, value))}.")
        array = map_observations(lambda x: convert(f"{self.name}: {key}", x), value)
        if key in OBSERVATION_KEYS or key == "actions":
            return array
        array = np.asarray(array)
        if array.size != len(array):
            raise DatasetError(f"{self.name}: {key} must have one number per step, got shape {array.shape}.")
        return array.reshape(-1)

    def source(self) -> FlatSource:
        """
        :return: the episodes
        """
        arrays, n_rows = self.arrays, self.n_rows
        rewards, following = arrays.get("rewards"), arrays.get("next_observations")
        terminations, truncations = (arrays.get(key, np.zeros(n_rows, bool)) for key in ("terminations", "truncations"))
        self._check_lengths([key for key in arrays if key != "observations"])
        if rewards is not None and "terminations" not in arrays:
            raise DatasetError(
                f"{self.name}: missing ['terminations'] (or 'terminals'), which values are learned with: steps after which "
                "the task is over; all False if there are none."
            )
        if "last_rows" in self.given:
            ends = self.given["last_rows"]
            self._check_lengths(["last_rows"])
        else:
            # in OGBench's recordings the world goes on after a termination
            ends = self._ends(truncations if self.is_ogbench else terminations | truncations)
        stops = np.flatnonzero(ends) + 1
        starts = np.concatenate([[0], stops[:-1]])
        shape = self._layout(len(stops), starts)
        successor = np.ones(len(stops), bool)
        if following is None and "observation_starts" not in shape:
            starts, stops, successor = self._shifted(starts, stops, terminations, rewards is not None)
        source = FlatSource(
            self.name,
            arrays["observations"],
            arrays["actions"],
            starts,
            stops,
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
            next_observations=following,
            has_successor=successor,
            observation_space=self.given.get("observation_space"),
            action_space=self.given.get("action_space"),
            **shape,
        )
        source.notes = tuple(self.notes)
        return source

    def _check_lengths(self, keys: list[str]) -> None:
        def check(array: Any) -> None:
            if len(array) != self.n_rows:
                raise DatasetError(f"{self.name}: arrays of different lengths: {len(array)} {key} but {self.n_rows} actions.")

        for key in keys:
            map_observations(check, self.arrays[key])
        if "next_observations" in self.arrays:
            key = "observations"
            map_observations(check, self.arrays[key])

    def _ends(self, flagged: np.ndarray) -> np.ndarray:
        ends = flagged.copy()
        ends[-1] = True
        if "episode" in self.arrays:
            ends[:-1] |= self.arrays["episode"][1:] != self.arrays["episode"][:-1]
        if "next_observations" in self.arrays:
            ends[:-1] |= breaks(self.name, self.arrays["observations"], self.arrays["next_observations"])
        elif not {"terminations", "truncations", "episode"} & set(self.arrays):
            self.notes.append(
                f"neither next_observations nor ends of episodes are given: all {self.n_rows} steps count as one episode"
            )
        return ends

    def _layout(self, n_episodes: int, starts: np.ndarray) -> dict[str, Any]:
        """Where the observations of an episode start, if there is one more than steps."""
        lengths: list[int] = []
        map_observations(lambda x: lengths.append(len(x)), self.arrays["observations"])
        if set(lengths) == {self.n_rows}:
            return {}
        if set(lengths) == {self.n_rows + n_episodes} and "last_rows" not in self.given:
            return {"observation_starts": starts + np.arange(n_episodes)}
        raise DatasetError(
            f"{self.name}: arrays of different lengths: {sorted(set(lengths))} observations but {self.n_rows} actions in "
            f"{n_episodes} episode(s); as many are needed, or without next_observations one more for every episode."
        )

    def _shifted(
        self, starts: np.ndarray, stops: np.ndarray, terminations: np.ndarray, has_rewards: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next observation is the next row's; the last step of an episode has none, and stays if it needs none."""
        if "last_rows" in self.given:
            stops, successor = stops - 1, np.ones(len(stops), bool)
        else:
            kept = terminations[stops - 1] | (not has_rewards)
            stops, successor = np.where(kept, stops, stops - 1), ~kept
            if not kept.all():
                n_dropped = int((~kept).sum())
                self.notes.append(
                    f"dropped the last step of {n_dropped} of {len(kept)} episodes ({n_dropped} of {self.n_rows} steps): they "
                    "do not terminate, and the observation after them is not in the data"
                )
        left = stops > starts
        if not left.any():
            raise DatasetError(f"{self.name}: no transitions: no episode has a step whose next observation is in the data.")
        return starts[left], stops[left], successor[left]


def _renamed(arrays: dict[str, Any], name: str) -> dict[str, Any]:
    for ours, others in SYNONYMS.items():
        found = [key for key in (ours, *others) if key in arrays]
        if len(found) > 1:
            raise DatasetError(f"{name}: {found} all mean {ours!r}: give one of them.")
        if found and found[0] != ours:
            arrays[ours] = arrays.pop(found[0])
    return arrays
