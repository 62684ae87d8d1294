"""Diffusion-BC: behaviour cloning with a diffusion policy."""

from typing import ClassVar

from sb3_consistency.algorithms.behaviour_cloning import BehaviourCloning
from sb3_consistency.generative.diffusion import DiffusionModel, DiffusionOptions
from sb3_consistency.generative.model import GenerativeModel


class DiffusionBC(DiffusionOptions, BehaviourCloning):
    r"""
    Behaviour cloning with a diffusion policy: offline, without rewards; the many-step peer of ConsistencyBC.

    .. math:: L = \mathbb{E}\, |\epsilon_\theta(\sqrt{\bar\alpha_t}\, a + \sqrt{1 - \bar\alpha_t}\, \epsilon,\ t, s)
        - \epsilon|^2, \quad t \sim \{1, \dots, T\}

    Source: Ho et al. 2020, equation 14; Wang et al. 2022 (Diffusion-BC).

    Needs data, no environment: ``learn(n)`` takes n gradient steps on the dataset.

    Differences from the released code: the learning rate starts at 3e-3 and decays to 0, as for ConsistencyBC (3e-4,
    constant); no moving average of the actor; DDIM sampling with fewer steps is an option.
    """

    model_class: ClassVar[type[GenerativeModel]] = DiffusionModel
