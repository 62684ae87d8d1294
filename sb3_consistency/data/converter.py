"""What episodes of any dataset become for a model: flat observations of its space, scaled actions, finite numbers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.episodes import Block, EpisodeSource
from sb3_consistency.envs.spaces import action_bounds, channels_first_space, flat_space
from sb3_consistency.envs.wrappers import flatten_nested


class EpisodeConverter:
    """
    Turns the episodes of one dataset into what the replay buffer of given spaces holds.

    :param source: the dataset
    :param observation_space: observation space of the model
    :param action_space: action space of the model
    :raises DatasetError: if the spaces don't match
    """

    def __init__(self, source: EpisodeSource, observation_space: spaces.Space, action_space: spaces.Box) -> None:
        self.source = source
        self.observation_space = observation_space
        self.action_space = action_space
        self.n_clipped = 0
        self._check_action_space()
        self._check_observation_space()

    def _check_action_space(self) -> None:
        theirs, ours = self.source.action_space, self.action_space
        if theirs is None:
            return
        if not isinstance(theirs, spaces.Box):
            raise DatasetError(f"{self.source.name} has actions in {theirs}: only continuous (Box) actions can be learned.")
        if theirs.shape != ours.shape:
            raise DatasetError(f"Action spaces don't match: {self.source.name} has {theirs}, the environment has {ours}.")
        same = np.allclose(theirs.low, ours.low) and np.allclose(theirs.high, ours.high)
        if not same and "action_space" not in self.source.inferred and np.isfinite([theirs.low, theirs.high]).all():
            raise DatasetError(
                f"Action bounds don't match: {self.source.name} has {theirs}, the environment has {ours}. "
                "Wrap the environment (gymnasium.wrappers.RescaleAction) so that actions mean the same in both."
            )

    def _check_observation_space(self) -> None:
        if self.source.observation_space is None:
            return
        theirs, ours = flat_space(self.source.observation_space), self.observation_space
        if isinstance(theirs, spaces.Dict) != isinstance(ours, spaces.Dict):
            raise DatasetError(f"Observation spaces don't match: {self.source.name} has {theirs}, the environment has {ours}.")
        if isinstance(theirs, spaces.Dict) and isinstance(ours, spaces.Dict):
            if theirs.keys() != ours.keys():
                raise DatasetError(
                    f"Observation keys don't match: {self.source.name} has {sorted(theirs)}, "
                    f"the environment has {sorted(ours)}."
                )
            pairs = [(f" {key!r}", theirs[key], ours[key]) for key in ours]
        else:
            pairs = [("", theirs, ours)]
        for key, their_space, our_space in pairs:
            if our_space.shape not in (their_space.shape, channels_first_space(their_space).shape):
                raise DatasetError(
                    f"Observation spaces{key} don't match: {self.source.name} has {their_space}, "
                    f"the environment has {our_space}."
                )

    def __call__(self, block: Block) -> Block:
        """
        :param block: transitions as the source gives them
        :return: the same with flat observations of the model's space and scaled, clipped actions (T, A)
        :raises DatasetError: if there are NaN or infinite values, or shapes that don't fit
        """
        self._check_finite(np.asarray(block.rewards), block, "rewards")
        return replace(
            block,
            observations=self._observations(block.observations, block, "observations"),
            next_observations=self._observations(block.next_observations, block, "next_observations"),
            actions=self._actions(np.asarray(block.actions), block),
            rewards=np.asarray(block.rewards, dtype=np.float32),
            terminations=np.asarray(block.terminations, dtype=bool),
            truncations=np.asarray(block.truncations, dtype=bool),
        )

    def _where(self, block: Block, what: str, row: int = 0) -> str:
        return f"{self.source.name}, episode {block.numbers[row]}: {what}"

    def _observations(self, observations: Any, block: Block, what: str) -> Any:
        if isinstance(self.observation_space, spaces.Dict):
            flat = flatten_nested(observations)
            return {k: self._observation(flat[k], s, block, f"{what} {k!r}") for k, s in self.observation_space.spaces.items()}
        return self._observation(np.asarray(observations), self.observation_space, block, what)

    def _observation(self, array: np.ndarray, space: spaces.Space, block: Block, what: str) -> np.ndarray:
        self._check_finite(array, block, what)
        shape = space.shape or ()
        if array.shape[1:] != shape and array.ndim == 4 and array.transpose(0, 3, 1, 2).shape[1:] == shape:
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1:] != shape and int(np.prod(array.shape[1:])) != int(np.prod(shape)):
            where = self._where(block, what)
            raise DatasetError(f"{where} have shape {array.shape[1:]} per step, the environment's have {shape}.")
        if np.issubdtype(space.dtype, np.integer) and array.dtype != space.dtype:
            with np.errstate(invalid="ignore"):
                lost = array.astype(space.dtype) != array
            if lost.any():
                raise DatasetError(
                    f"{self._where(block, what)} are {array.dtype}, {array[lost][0]} for example, and the environment's "
                    f"{space.dtype}: multiply images in [0, 1] by 255, or pass an environment whose observations are floats."
                )
        return array.reshape(len(array), *shape)

    def _actions(self, actions: np.ndarray, block: Block) -> np.ndarray:
        shape, where = self.action_space.shape, self._where(block, "actions")
        if np.issubdtype(actions.dtype, np.integer) and actions.shape[1:] != shape:
            raise DatasetError(f"{where} are discrete ({actions.dtype}): only continuous (Box) actions can be learned.")
        if int(np.prod(actions.shape[1:])) != int(np.prod(shape)) or actions.ndim < 2:
            raise DatasetError(f"{where} have shape {actions.shape[1:]} per step, the environment's have {shape}.")
        self._check_finite(actions, block, "actions")
        actions = actions.reshape(len(actions), -1).astype(np.float64)
        if not self.source.scaled_actions:
            bounds = action_bounds(self.action_space)
            actions = (actions - bounds.middle.reshape(-1)) / bounds.half_range.reshape(-1)
        self.n_clipped += int((np.abs(actions) > 1 + 1e-5).any(axis=1).sum())
        return actions.clip(-1, 1).astype(np.float32)

    def _check_finite(self, array: np.ndarray, block: Block, what: str) -> None:
        if not np.issubdtype(array.dtype, np.floating):
            return
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32, copy=False))  # what the networks get
        if not finite.all():
            row, *entry = (int(i) for i in np.argwhere(~finite)[0])
            step = int(block.steps[row])
            remedy = " (rewards may be left out to clone behaviour)" if what == "rewards" else ""
            raise DatasetError(
                f"{self._where(block, what, row)}: {array[(row, *entry)]} at step {step} (index {(step, *entry)}); finite "
                f"float32 numbers are needed{remedy}."
            )

    def warn_if_clipped(self, n_transitions: int) -> None:
        """
        Warn once of what the data gave up: actions that were clipped, and what its reader left out.

        :param n_transitions: number of transitions converted
        """
        for note in self.source.notes:
            warnings.warn(f"{self.source.name}: {note}.", stacklevel=5)
        if self.n_clipped:
            share = 100 * self.n_clipped / n_transitions
            warnings.warn(
                f"{self.source.name}: clipped the actions of {self.n_clipped} of {n_transitions} transitions ({share:.2g} %), "
                f"which lay outside {self.action_space}.",
                stacklevel=5,
            )
