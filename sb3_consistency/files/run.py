"""Where a run stands: plain data, the one thing that zips, safe files and checkpoints carry beside options and weights."""

from dataclasses import dataclass, field
from typing import Any

from sb3_consistency.data.rewards import RewardFunction


@dataclass
class Run:
    """
    What an algorithm remembers of its training, beside SB3's own counters.

    :ivar algorithm: name of the class: SB3's ``load`` would put one algorithm's attributes into another
    :ivar was_pretrained: whether there was an offline phase
    :ivar began_with_data: whether its constructor had a dataset; what a file of before does not know
    :ivar from_scratch: whether the first gradient step was an online one; None before it
    :ivar explores: whether there was an online gradient step, since which noise may be added
    :ivar pretrain_start: gradient steps before the constructor's ``pretrain_steps``; None before that
    :ivar online_timesteps: environment steps before the present offline phase; None outside of one
    :ivar counts_before_pretraining: SB3's counts of the timesteps of a call, before it
    :ivar curriculum_end: gradient step at which curricula end; None while that is not known
    :ivar student_started: whether a planner's student has its teacher's weights
    :ivar reference_returns: returns of a random policy and of an expert, where the data tells them
    :ivar reward_function: transform of the rewards; None for none
    :ivar inferred_spaces: names of spaces that were inferred from arrays: an environment's take their place
    :ivar n_step_class_is_derived: whether the class of the replay buffer follows from ``n_steps``
    :ivar in_vec_normalize: whether it learned from observations that ``VecNormalize`` normalised
    :ivar call: name and arguments of the latest call of ``learn`` or ``pretrain``: what a resumed run continues
    :ivar id: of a run that writes checkpoints
    """

    algorithm: str = ""
    was_pretrained: bool = False
    began_with_data: bool = True
    from_scratch: bool | None = None
    explores: bool = False
    pretrain_start: int | None = None
    online_timesteps: int | None = None
    counts_before_pretraining: tuple[int, int] = (0, 0)
    curriculum_end: int | None = None
    student_started: bool = False
    reference_returns: tuple[float, float] | None = None
    reward_function: RewardFunction | None = None
    inferred_spaces: list[str] = field(default_factory=list)
    n_step_class_is_derived: bool = False
    in_vec_normalize: bool = False
    call: tuple[str, dict[str, Any]] | None = None
    id: str | None = None
