"""Diffusion-QL: actor-critic with a diffusion policy."""

from typing import ClassVar

from sb3_consistency.algorithms.actor_critic import ActorCritic
from sb3_consistency.generative.diffusion import DiffusionModel, DiffusionOptions
from sb3_consistency.generative.model import GenerativeModel


class DiffusionQL(DiffusionOptions, ActorCritic):
    r"""
    Actor-critic with a diffusion policy: the many-step peer of ConsistencyAC and CPQL.

    The objective is :class:`~sb3_consistency.algorithms.actor_critic.ActorCritic`'s, with the error of the predicted noise
    as in :class:`DiffusionBC`; the gradient of the Q term goes through all sampling steps:

    .. math:: L_\mathrm{bc} = \mathbb{E}\, |\epsilon_\theta(\sqrt{\bar\alpha_t}\, a + \sqrt{1 - \bar\alpha_t}\, \epsilon,
        \ t, s) - \epsilon|^2.

    Source: Wang et al. 2022 (Diffusion-QL), algorithm 1.

    Differences from the released code: predicted clean actions are clamped with the gradient projected at the bounds,
    not cut; the EMA actor follows at every step from the first (there at every fifth, from step 1000); critics have
    LayerNorm (``policy_kwargs=dict(layer_norm=False)`` switches it off); observations are standardised; the actor's
    learning rate is 3e-3 offline (3e-4), and learning rates fall to 0 offline; no clipping unless asked for; DDIM
    sampling with fewer steps is an option; time-outs bootstrap.
    """

    model_class: ClassVar[type[GenerativeModel]] = DiffusionModel
