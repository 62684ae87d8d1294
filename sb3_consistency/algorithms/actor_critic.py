r"""Actor-critics: the objective that ConsistencyAC, CPQL and DiffusionQL share."""

from collections.abc import Mapping
from typing import ClassVar

import torch as th
from stable_baselines3.common.type_aliases import TensorDict

from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.options import StepSchedule, at_step, option
from sb3_consistency.policies.modules import Follow, GenerativeCritic, Network
from sb3_consistency.policies.policy import CandidateOptions
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch, tree_map
from sb3_consistency.training.updater import LossFn
from sb3_consistency.values.losses import batch_normalised, normalised_q_loss, pessimistic_value, td_target, twin_q_loss

ACTOR_Q = ("random", "min", "mean")
TARGET_POLICIES = ("ema", "current")
MAX_Q_ACTIONS = 10
#: of the actor; a fixed dataset bears more than moving experience, and needs it to be fitted precisely
OFFLINE_LEARNING_RATE = 3e-3


class ActorCritic(CandidateOptions, GenerativeAlgorithm):
    r"""
    An actor trained by behaviour cloning and by the critics, critics trained by temporal differences.

    .. math::

        L_\mathrm{actor} &= \alpha L_\mathrm{bc}(s, a) + \eta L_q, \qquad
        L_q = -\frac{\mathbb{E}\, Q_i(s, \hat a)}{\mathrm{sg}\, \mathbb{E} |Q_j(s, \hat a)|}, \quad \hat a \sim \pi(s) \\
        L_\mathrm{critic} &= \sum_j \mathbb{E} (Q_j(s, a) - y)^2, \qquad
        y = r + \gamma (1 - d) \min_j Q'_j(s', a'), \quad a' \sim \pi'(s')

    Source: Ding & Jin 2024, section 4.2; Wang et al. 2022. :math:`L_\mathrm{bc}` is the generative model's own loss.
    """

    model_class: ClassVar[type[GenerativeModel]]

    n_candidates: int = 50
    eta: StepSchedule = option(
        default=1.0, low=0, doc="weight of the Q term, a number or a function of the gradient step", search=(0.01, 10.0, "log")
    )
    alpha: StepSchedule | None = option(
        default=None,
        low=0,
        doc="weight of the behaviour-cloning term, likewise; None for 1 in and after an offline phase, and 0 online from "
        "scratch, where it would clone the policy's own past",
        # 0 is the default, and on no logarithmic scale
        search={"offline": (0.001, 1.0, "log"), "online": [0.0, 0.005, 0.05, 0.5]},
    )
    train_sampling_steps: int | None = option(
        default=None, low=1, doc="network evaluations per action inside the losses; None for the acting number"
    )
    max_q_backup: bool = option(
        default=False, doc="the target takes the best of 10 next actions, per critic (AntMaze)", search=[False, True]
    )
    q_norm: bool = option(
        default=False, doc="divide the target by its standard deviation over the batch", search=[False, True]
    )
    actor_q: str = option(
        default="random",
        one_of=ACTOR_Q,
        doc='critic in the Q term: "random" (one raised, another sets the scale), "min" or "mean" of them',
    )
    normalize_actor_q: bool = option(default=True, doc="divide the Q term by the mean of |Q|")
    target_policy: str = option(
        default="ema",
        one_of=TARGET_POLICIES,
        fixed=True,
        doc='actor that supplies the next action: "ema" (its moving average) or "current"',
    )
    actor_ema_decay: float = option(default=0.995, low=0, high=1, doc="decay of that moving average per update")
    actor_ema_interval: int = option(default=1, low=1, doc="gradient steps between its updates")
    actor_ema_start: int = option(default=0, low=0, size=False, doc="gradient steps for which it just follows the actor")
    #: weights of the two terms at the present gradient step, as tensors: a compiled loss takes numbers for constants
    step_alpha: th.Tensor | None = option(init=False)
    step_eta: th.Tensor = option(init=False)

    def networks(self) -> Mapping[str, Network]:
        targets = {}
        if self.target_policy == "ema":
            targets["actor_target"] = Follow(1 - self.actor_ema_decay, self.actor_ema_interval, self.actor_ema_start)
        critic = Network(GenerativeCritic, {}, {"critic_target": Follow(self.tau, self.target_update_interval)})
        return {"actor": self.actor_network(**targets), "critic": critic}

    def losses(self) -> Mapping[str, LossFn]:
        return {"critic": self.critic_loss, "actor": self.actor_loss}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        alpha L_bc + eta L_q.

        :param batch: transitions
        :return: loss of the actor, scalars to log
        """
        # once for both terms: of images they cost most of the step
        features = self.policy.actor.features(batch.observations)
        noise = self.actor_noise(features)
        actions = self.policy.actor.model.sample(noise, features)
        q_loss = self.q_term(batch, actions)
        if self.step_alpha is None:
            return self.step_eta * q_loss, {"q_loss": q_loss.detach()}
        bc_loss = self.bc_term(batch, features, noise, actions)
        loss = self.step_alpha * bc_loss + self.step_eta * q_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}

    def actor_noise(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: the actor's features of the observations, (B, F)
        :return: noise that the actor learns from, (S, B, A)
        """
        return self.policy.actor.noise(features, self.train_sampling_steps)

    def bc_term(self, batch: Batch, features: th.Tensor, noise: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        What ties the actor to the data: its generative model's own loss, unless a subclass has another reference.

        :param batch: transitions
        :param features: the actor's features of their observations, (B, F)
        :param noise: what its actions were made of, (S, B, A)
        :param actions: its actions in their states, scaled, (B, A)
        :return: L_bc, scalar
        """
        return self.policy.bc_term(batch.observations, features, batch.actions, self.progress)

    def q_term(self, batch: Batch, actions: th.Tensor) -> th.Tensor:
        """
        Policy-improvement term: raises the value of actions sampled from the actor.

        :param batch: transitions
        :param actions: drawn by the actor in their states, scaled, (B, A)
        :return: L_q = -E[Q_i(s, a)] / E|Q_j(s, a)|, or as ``actor_q`` and ``normalize_actor_q`` say, scalar
        """
        policy = self.policy
        with th.no_grad():
            critic_features = policy.critic.features(batch.observations)
        if self.actor_q == "random" and policy.n_critics > 1:
            # only the critic that is raised needs a backward pass
            raised_one, scale_one = th.rand(policy.n_critics, device=self.device).argsort()[:2].split(1)
            raised = policy.critic.q_networks(critic_features, actions, raised_one)
            with th.no_grad():
                scale = policy.critic.q_networks(critic_features, actions, scale_one) if self.normalize_actor_q else raised
        else:
            q_values = policy.critic.q_networks(critic_features, actions)
            raised = scale = q_values.mean(dim=1) if self.actor_q == "mean" else q_values.amin(dim=1)
        return normalised_q_loss(raised, scale) if self.normalize_actor_q else -raised.mean()

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        Mean squared temporal-difference error, summed over the critics.

        :param batch: transitions
        :return: loss of the critics, scalars to log
        """
        with th.no_grad():
            target = td_target(batch.rewards, batch.dones, batch.discounts, self.next_value(batch))
            if self.q_norm:
                target = batch_normalised(target)
        q_values = self.policy.critic(batch.observations, batch.actions)
        return twin_q_loss(q_values, target), {"q_value": q_values.detach().mean()}

    def next_value(self, batch: Batch) -> th.Tensor:
        """
        :param batch: transitions
        :return: pessimistic value of the next state under the target networks, (B, 1)
        """
        actor = getattr(self.policy, "actor_target" if self.target_policy == "ema" else "actor")
        obs, critic = batch.next_observations, self.policy.critic_target
        if not self.max_q_backup:
            actions = actor.sample(actor.features(obs), self.train_sampling_steps)
            return pessimistic_value(critic(obs, actions), self._random_pair())
        repeated = tree_map(lambda x: x.repeat_interleave(MAX_Q_ACTIONS, dim=0), obs)
        actions = actor.sample(actor.features(repeated), self.train_sampling_steps)
        best = critic(repeated, actions).unflatten(0, (-1, MAX_Q_ACTIONS)).amax(dim=1)
        return pessimistic_value(best, self._random_pair())

    def _random_pair(self) -> th.Tensor | None:
        n_critics = self.policy.n_critics
        return th.rand(n_critics, device=self.device).argsort()[:2] if n_critics > 2 else None

    # the two weights

    def prepare_step(self) -> None:
        super().prepare_step()
        alpha, eta = self.alpha_now(), at_step(self.eta, self._n_updates)
        self.step_alpha = th.full((), alpha, device=self.device) if alpha != 0 else None
        self.step_eta = th.full((), eta, device=self.device)

    def alpha_now(self) -> float:
        """
        :return: the weight of the behaviour-cloning term at this gradient step
        """
        if self.alpha is None:
            return 1.0 if self.data.buffer is not None or self.run.was_pretrained else 0.0
        return at_step(self.alpha, self._n_updates)

    def actor_rate(self, progress: float) -> float:
        if self.actor_learning_rate is None and self.in_offline_phase:
            return OFFLINE_LEARNING_RATE
        return super().actor_rate(progress)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "step_alpha", "step_eta"]
