"""Consistency-AC: actor-critic with a consistency policy."""

from typing import ClassVar

from sb3_consistency.algorithms.actor_critic import ActorCritic
from sb3_consistency.generative.consistency import ConsistencyActorOptions
from sb3_consistency.generative.exploration import ExploringModel
from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.training.temperature import TemperatureOptions


class ConsistencyAC(TemperatureOptions, ConsistencyActorOptions, ActorCritic):
    r"""
    Actor-critic with a consistency policy, regularised by the consistency loss on the data.

    The objective is :class:`~sb3_consistency.algorithms.actor_critic.ActorCritic`'s, with consistency training on the data:

    .. math:: L_\mathrm{bc} = \mathbb{E}\, \lambda(\sigma_n)\,
        d\big(f(a + \sigma_{n+1} z, \sigma_{n+1} | s),\ \mathrm{sg}\, f(a + \sigma_n z, \sigma_n | s)\big).

    Source: Ding & Jin 2024, section 4.2, algorithm 1; Song & Dhariwal 2023 for ``bc_loss="ict"``.

    Differences from the released code: the loss is improved consistency training (iCT) by default; two steps are
    {80, 2.52}, not {80, 2}; the curriculum runs over the whole training, not over every chunk of 50k steps; the loss is
    not clamped, and the Q term's gradient is projected at the bounds; the EMA actor follows at every step from the first
    (there at every fifth; it is the random initial network until step 1000); observations are standardised; loading
    restores targets and optimizers; time-outs bootstrap; the curriculum ends at 160 levels; the actor's learning rate is
    3e-3 offline (3e-4), and learning rates fall to 0 offline; no loss scaling or clipping unless asked for.
    """

    model_class: ClassVar[type[GenerativeModel]] = ExploringModel
    sampling_steps: int = 2
