"""Observation normalisation that lives inside the networks, so that it is saved and exported with them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_consistency.envs.spaces import is_normalised_space


class _Standardise(nn.Module):
    mean: th.Tensor
    std: th.Tensor
    # online from scratch there are no statistics: subtracting zeros is felt in an action's few operations
    is_identity: bool = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(shape))
        self.register_buffer("std", th.ones(shape))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x if self.is_identity else (x - self.mean) / self.std

    def fit(self, mean: np.ndarray, std: np.ndarray) -> None:
        self.mean.copy_(th.as_tensor(mean, dtype=th.float32))
        self.std.copy_(th.as_tensor(std, dtype=th.float32))
        self._look()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._look()

    def _look(self) -> None:
        self.is_identity = bool((self.mean == 0).all() and (self.std == 1).all())


class ObservationNormalizer(nn.Module):
    """
    Standardises continuous observations with fixed statistics; the identity until :meth:`fit` is called.

    :param observation_space: space of the observations, Box or (flat) Dict
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__()
        if isinstance(observation_space, spaces.Dict):
            # module names can't hold dots, so the entries are numbered in the order of the space
            entries = list(observation_space.spaces.items())
            self.names = {key: f"entry{i}" for i, (key, space) in enumerate(entries) if is_normalised_space(space)}
        else:
            entries = [("", observation_space)]
            self.names = {"": "entry0"} if is_normalised_space(observation_space) else {}
        spaces_by_key = dict(entries)
        self.entries = nn.ModuleDict({name: _Standardise(spaces_by_key[key].shape or ()) for key, name in self.names.items()})

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        """
        :param observations: preprocessed observations, (B, ...), or a dict of them
        :return: the same, with the continuous entries standardised
        """
        if not self.names:
            return observations
        if isinstance(observations, dict):
            return {k: self.entries[self.names[k]](v) if k in self.names else v for k, v in observations.items()}
        return self.entries["entry0"](observations)

    def invert(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: standardised observations of a space that is no Dict, (..., *shape)
        :return: the observations themselves
        """
        entry = self.entries["entry0"]
        assert isinstance(entry, _Standardise)
        return observations * entry.std + entry.mean

    def fit(self, mean: Mapping[str, np.ndarray], std: Mapping[str, np.ndarray]) -> None:
        """
        Set the statistics. Dimensions that hardly vary keep a unit scale, or their rounding errors would be blown up.

        :param mean: mean per key ("" for an observation space that is no Dict), each of the entry's shape
        :param std: standard deviation per key
        """
        for key, name in self.names.items():
            entry = self.entries[name]
            assert isinstance(entry, _Standardise)
            entry.fit(mean[key], np.where(std[key] > 1e-6, std[key], 1.0))
