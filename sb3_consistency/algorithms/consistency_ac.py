"""Consistency-AC: actor-critic with a consistency policy."""

from typing import ClassVar, Unpack

from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_consistency.common.actor_critic import GenerativeActorCritic
from sb3_consistency.common.arguments import SharedArguments, StepSchedule
from sb3_consistency.common.consistency import ConsistencyPolicyMixin
from sb3_consistency.common.policies import GenerativePolicy


class ConsistencyAC(ConsistencyPolicyMixin, GenerativeActorCritic):
    """
    Actor-critic with a consistency policy, regularised by the consistency loss on the data.

    Objective: actor alpha L_c + eta L_q, critics r + gamma (1 - terminal) min_j Q'_j(s', a'), a' from the actor's moving
    average. Source: Ding & Jin 2024, section 4.2, algorithm 1.

    Differences from the released code: the loss is improved consistency training (iCT) by default; two steps are
    {80, 2.52}, not {80, 2}; the curriculum runs over the whole training, not over every chunk of 50k steps; the loss is
    not clamped, and the Q term's gradient is projected at the bounds; the EMA actor follows from the first step (there
    it is the random initial network until step 1000); loading restores targets and optimizers; time-outs bootstrap;
    no loss scaling, clipping or cosine decay unless asked for.

    The options are those of :class:`~sb3_consistency.common.consistency.ConsistencyPolicyMixin` and
    :class:`~sb3_consistency.common.actor_critic.GenerativeActorCritic`.

    :param kwargs: see :class:`~sb3_consistency.common.arguments.SharedArguments`
    """

    # the Q term alone, as in the released code: 0.05 of the iCT loss keeps Pendulum from being learned (docs/results)
    online_alpha: ClassVar[float] = 0.0

    def __init__(
        self,
        policy: str | type[GenerativePolicy],
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        *,
        eta: StepSchedule = 1.0,
        alpha: StepSchedule | None = None,
        sampling_steps: int = 2,
        train_sampling_steps: int | None = None,
        bc_loss: str = "ict",
        metric: str | None = None,
        loss_scaling: bool = False,
        curriculum: tuple[int, int] | None = None,
        consistency_ema_decay: float = 0.0,
        n_candidates: int = 50,
        n_eval_candidates: int = 1,
        candidate_selection: str = "softmax",
        candidate_temperature: float = 1.0,
        max_q_backup: bool = False,
        q_norm: bool = False,
        actor_q: str = "random",
        normalize_actor_q: bool = True,
        target_policy: str = "ema",
        actor_ema_decay: float = 0.995,
        actor_ema_interval: int = 1,
        actor_ema_start: int = 0,
        **kwargs: Unpack[SharedArguments],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            eta=eta,
            alpha=alpha,
            sampling_steps=sampling_steps,
            train_sampling_steps=train_sampling_steps,
            bc_loss=bc_loss,
            metric=metric,
            loss_scaling=loss_scaling,
            curriculum=curriculum,
            consistency_ema_decay=consistency_ema_decay,
            n_candidates=n_candidates,
            n_eval_candidates=n_eval_candidates,
            candidate_selection=candidate_selection,
            candidate_temperature=candidate_temperature,
            max_q_backup=max_q_backup,
            q_norm=q_norm,
            actor_q=actor_q,
            normalize_actor_q=normalize_actor_q,
            target_policy=target_policy,
            actor_ema_decay=actor_ema_decay,
            actor_ema_interval=actor_ema_interval,
            actor_ema_start=actor_ema_start,
            **kwargs,
        )
