"""CPQL and CPIQL: Q-learning with a one-step consistency policy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, TensorDict

from sb3_consistency.algorithms.actor_critic import ActorCritic
from sb3_consistency.generative.consistency import BC_LOSSES, ConsistencyActorOptions, ConsistencyOptions, squared_error
from sb3_consistency.generative.denoising import DenoisingModel
from sb3_consistency.generative.exploration import ExploringModel
from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.generative.networks import in_float32
from sb3_consistency.options import check_range, option, redeclared
from sb3_consistency.policies.modules import Follow, GenerativeActor, Network, ValueNetwork
from sb3_consistency.training.batches import Batch, tree_map
from sb3_consistency.training.temperature import TemperatureOptions
from sb3_consistency.training.updater import LossFn
from sb3_consistency.values.losses import choose_candidate, expectile_loss, pessimistic_value

#: rows of a batch in which distillation has z = 0: evenly spread, so that offline and online data have their share
DETERMINISTIC_ROWS = slice(None, None, 4)
TEACHERS = ("denoiser", "consistency")
VALUE_MODES = ("q", "iql")
VALUE_CRITICS = ("target", "current")


def _check_expectile(name: str, value: Any) -> None:
    check_range(name, value, 0, 1, open_low=True)
    if value == 1:
        raise ValueError(f"{name} must be below 1, got 1.")


class CPQL(TemperatureOptions, ConsistencyActorOptions, ActorCritic):
    r"""
    Consistency Policy with Q-Learning: one network pass per action, in training too.

    The objective is :class:`~sb3_consistency.algorithms.actor_critic.ActorCritic`'s, with the reconstruction loss

    .. math:: L_\mathrm{bc} = \mathbb{E}\, (\sigma^{-2} + \sigma_\mathrm{data}^{-2})\, |f(a + \sigma z, \sigma | s) - a|^2.

    With ``value_mode="iql"`` it is CPIQL: V is an expectile of the critics at the data's actions, and their target:

    .. math:: L_V = \mathbb{E}\, |\tau - 1(u < 0)|\, u^2, \quad u = \min_j Q'_j(s, a) - V(s), \qquad
        y = r + \gamma (1 - d) V(s').

    With ``bc_loss="distill"`` a second network, the teacher T, learns the data alone, and makes the same action of the same
    noise z. The actor f learns from it and from the critics, at that z:

    .. math:: L_\mathrm{bc} = \mathbb{E}\, |f(z, s) - \mathrm{sg}\, a^*|^2, \quad a^* = T(z, s) \text{ for } z \ne 0, \quad
        a^* = \arg\max_{a_j} \min_i Q_i(s, a_j) \text{ of } a_1 = T(0, s),\ a_j = T(\rho\, \xi_j, s), \text{ for } z = 0.

    Reconstruction at the highest noise level is the mean of all modes; paired by z, they stay apart. z is 0 in a quarter of
    the rows: deterministic actions are f(0, s), which imitate the best of N, in one pass. The teacher is a denoiser
    (:class:`~sb3_consistency.generative.denoising.DenoisingModel`), four passes per action, or with
    ``distill_teacher="consistency"`` a consistency model (``"ict"``), one pass.

    Source: Chen, Li & Zhao 2024 (not Conservative Peng's Q(lambda), which is abbreviated CPQL too); Kostrikov et al. 2021;
    Park et al. 2025 (FQL) for the pairing by z, there with a flow for the teacher and without z = 0.

    Differences from the released code: half of the noise levels of L_rec are those at which the policy acts
    (``policy_kwargs=dict(model_kwargs=dict(sampling_share=0.0))`` is the code); a' comes from the actor's moving average,
    as the paper writes (``target_policy="current"`` is the code); targets move at every step, from the first; the actor's
    learning rate is 3e-3 offline (3e-4), and learning rates fall to 0 offline; the noise embedding is smooth
    (``policy_kwargs=dict(embedding_scale=250.0)`` is the code); critics have LayerNorm online too
    (``policy_kwargs=dict(layer_norm=False)`` switches it off); V of CPIQL has LayerNorm, regresses on the target critics,
    has its own optimizer and is not clipped with them; online the Q term is normalised (from scratch the policy is
    another one; with ``ent_coef=0`` the Q term stands alone, there with alpha 0.05), and time-limits bootstrap.
    """

    model_class: ClassVar[type[GenerativeModel]] = ExploringModel
    bc_loss: str = redeclared(
        ConsistencyOptions,
        "bc_loss",
        default="reconstruction",
        one_of=(*BC_LOSSES, "distill"),
        doc='"reconstruction" (the paper\'s), "distill" (a teacher keeps the modes), "ict" or "consistency"',
    )
    distill_teacher: str = option(
        default="denoiser",
        one_of=TEACHERS,
        fixed=True,
        before="consistency",
        doc='the teacher of "distill": "denoiser" is precise; "consistency" scatters around the data, fails on narrow data, '
        "and was far better on one of two mixed sets",
    )
    target_candidates: int = option(
        default=8,
        low=1,
        before=8,
        doc='actions N, of which the critics choose what deterministic actions learn in "distill"; the first is T(0, s)',
    )
    target_noise: float = option(default=1.0, low=0, before=0.5, doc="standard deviation rho of the others' noise")
    value_mode: str = option(
        default="q", one_of=VALUE_MODES, fixed=True, doc='"q" (CPQL) or "iql" (CPIQL)', search=list(VALUE_MODES)
    )
    expectile: float = option(
        default=0.7, check=_check_expectile, doc="expectile of the value loss of CPIQL, in (0, 1)", search=(0.5, 0.95)
    )
    value_critic: str = option(
        default="target", one_of=VALUE_CRITICS, doc='critics that the value of CPIQL regresses on, "target" or "current"'
    )

    @property
    def distills(self) -> bool:
        """Whether a teacher stands between the data and the actor."""
        return self.bc_loss == "distill"

    @property
    def cloning_network(self) -> str:
        return "teacher" if self.distills else super().cloning_network

    @property
    def policy_defaults(self) -> dict[str, Any]:
        # z = 0 is trained, and no middle between modes: it learns what the critics choose
        return {**super().policy_defaults, **({"noise_scale": 0.0} if self.distills else {})}

    def actor_network(self, **targets: Follow) -> Network:
        network = super().actor_network(**targets)
        # the loss of a consistency teacher; the actor's model then has none of its own
        return network.of_model(bc_loss="ict") if self.distills else network

    def networks(self) -> Mapping[str, Network]:
        return {
            **super().networks(),
            **({"value": Network(ValueNetwork)} if self.value_mode == "iql" else {}),
            **({"teacher": self._teacher_network()} if self.distills else {}),
        }

    def _teacher_network(self) -> Network:
        if self.distill_teacher == "consistency":
            return replace(self.actor_network().of_model(form="plain", exploration="none"), targets={})
        return Network(GenerativeActor, {"model_class": DenoisingModel, "model_kwargs": {"horizon": self.horizon}})

    def losses(self) -> Mapping[str, LossFn]:
        return {
            **({"value": self.value_loss} if self.value_mode == "iql" else {}),
            **({"teacher": self.teacher_loss} if self.distills and not self.is_from_scratch else {}),
            **super().losses(),
        }

    def teacher_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        Denoising, or consistency training, on the data alone.

        :param batch: transitions
        :return: loss of the teacher, scalars to log
        """
        teacher = self.policy.teacher
        return teacher.bc_loss(teacher.features(batch.observations), batch.actions, None, self.progress).mean(), {}

    def actor_noise(self, features: th.Tensor) -> th.Tensor:
        noise = super().actor_noise(features)
        if self.distills:
            noise[:, DETERMINISTIC_ROWS] = 0
        return noise

    def bc_term(self, batch: Batch, features: th.Tensor, noise: th.Tensor, actions: th.Tensor) -> th.Tensor:
        if not self.distills:
            return super().bc_term(batch, features, noise, actions)
        return squared_error(actions, self.distillation_target(batch.observations, noise)).mean()

    @th.no_grad()
    def distillation_target(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        The teacher's action at the actor's noise; in the rows without noise, the best of it and of others at other noise.

        The others are the teacher's, too: they stay with the data, where the critics know what actions are worth.

        :param obs: observations, (B, ...)
        :param noise: the actor's noise, (S, B, A)
        :return: scaled actions, (B, A)
        """
        teacher, critic, n = self.policy.teacher, self.policy.critic, self.target_candidates
        features = teacher.features(obs)
        target: th.Tensor = teacher.model.sample(noise, features)
        if n > 1:
            first, features = target[DETERMINISTIC_ROWS], features[DETERMINISTIC_ROWS].repeat(n - 1, 1)
            others_noise = th.randn(len(noise), len(features), first.shape[1], device=noise.device)
            others = teacher.model.sample(self.target_noise * others_noise, features)
            actions = th.cat([first, others])
            q_features = critic.features(tree_map(lambda x: x[DETERMINISTIC_ROWS], obs)).repeat(n, 1)
            # bfloat16 rounds by as much as they differ
            q_values = pessimistic_value(in_float32(critic.q_networks, q_features, actions))
            # (N R, ...), the N of a row R apart, to (R, N, ...)
            by_row = q_values.view(n, -1).T, actions.view(n, *first.shape).transpose(0, 1)
            target[DETERMINISTIC_ROWS] = choose_candidate(*by_row)
        return target

    def check_together(self) -> None:
        super().check_together()
        if self.max_q_backup and self.value_mode == "iql":
            raise ValueError('max_q_backup must be False with value_mode="iql", whose target takes no action, got True.')
        if self.is_built and self.distills != ("teacher" in self.policy.structure):
            raise ValueError(
                f'bc_loss can\'t become {self.bc_loss!r} on a CPQL that is built: with "distill" it has a teacher, give it to '
                "the constructor."
            )

    def option_changed(self, name: str, value: Any) -> None:
        if not (name == "bc_loss" and self.distills):
            super().option_changed(name, value)

    def value_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        Expectile regression of V(s) on min_j Q_j(s, a) at the data's actions (Kostrikov et al. 2021, equation 5).

        :param batch: transitions
        :return: loss of the value network, scalars to log
        """
        critic = self.policy.critic_target if self.value_critic == "target" else self.policy.critic
        with th.no_grad():
            q_value = pessimistic_value(critic(batch.observations, batch.actions))
        return expectile_loss(q_value - self.policy.value(batch.observations), self.expectile), {}

    def next_value(self, batch: Batch) -> th.Tensor:
        if self.value_mode == "iql":
            value: th.Tensor = self.policy.value(batch.next_observations)
            return value
        return super().next_value(batch)
