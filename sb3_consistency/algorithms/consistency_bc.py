"""Consistency-BC: behaviour cloning with a consistency policy."""

from typing import ClassVar

from sb3_consistency.algorithms.behaviour_cloning import BehaviourCloning
from sb3_consistency.generative.consistency import ConsistencyActorOptions, ConsistencyModel
from sb3_consistency.generative.model import GenerativeModel


class ConsistencyBC(ConsistencyActorOptions, BehaviourCloning):
    r"""
    Behaviour cloning with a consistency policy: offline, without rewards, and acts in one or two network passes.

    .. math:: L = \mathbb{E}\, \lambda(\sigma_n)\,
        d\big(f(a + \sigma_{n+1} z, \sigma_{n+1} | s),\ \mathrm{sg}\, f(a + \sigma_n z, \sigma_n | s)\big)

    Source: Ding & Jin 2024, section 4.1; Song & Dhariwal 2023 for ``bc_loss="ict"``.

    Needs data, no environment: ``learn(n)`` takes n gradient steps on the dataset.

    Differences from the released code: the loss is improved consistency training (iCT) by default, because the
    paper's needs far more than 100k steps (``bc_loss="consistency", consistency_ema_decay=0.999`` is close to it);
    the curriculum runs over the whole training and ends at 160 levels; the loss is not clamped; two steps are {80, 2.52},
    not {80, 2};
    the network has CM's input scaling c_in and a smooth log-noise embedding; the learning rate starts at 3e-3 and
    decays to 0 (3e-4, constant).
    """

    model_class: ClassVar[type[GenerativeModel]] = ConsistencyModel
