"""Means of what is logged, on the device."""

import torch as th
from stable_baselines3.common.type_aliases import TensorDict


class RunningMeans:
    """
    Means of scalars by name, summed in place.

    A tensor kept for every step would lie between the large ones of two steps and keep the allocator from using their
    memory again: a run swung by 400 MB (docs/reliability.md).
    """

    def __init__(self) -> None:
        self._sums: TensorDict = {}
        self._counts: dict[str, int] = {}

    def add(self, values: TensorDict) -> None:
        """
        :param values: scalars of one step, by name
        """
        for name, value in values.items():
            if name in self._sums:
                self._sums[name] += value
                self._counts[name] += 1
            else:
                self._sums[name], self._counts[name] = value.clone(), 1

    def read(self) -> dict[str, float]:
        """
        The one host-device synchronisation of a call.

        :return: the means so far
        """
        if not self._sums:
            return {}
        means = th.stack([total / self._counts[name] for name, total in self._sums.items()]).tolist()
        return dict(zip(self._sums, means, strict=True))
