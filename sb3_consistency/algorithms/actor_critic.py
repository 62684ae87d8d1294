"""Critic loss and policy-improvement term shared by ConsistencyAC, CPQL and DiffusionQL."""

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import TensorDict

from sb3_consistency.options import StepSchedule, at_step, check_choice, check_flags, check_range
from sb3_consistency.policies.policy import CANDIDATE_SELECTIONS
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch, tree_map
from sb3_consistency.training.updater import LossFn
from sb3_consistency.values.losses import batch_normalised, normalised_q_loss, pessimistic_value, td_target, twin_q_loss

ACTOR_Q = ("random", "min", "mean")
TARGET_POLICIES = ("ema", "current")
MAX_Q_ACTIONS = 10
#: of the actor; a fixed dataset bears more than moving experience, and needs it to be fitted precisely
OFFLINE_LEARNING_RATE = 3e-3


class GenerativeActorCritic(GenerativeAlgorithm):
    """
    An actor trained by behaviour cloning and by the critics, critics trained by temporal differences.

    :param eta: weight of the Q term, a number or a function of the gradient step
    :param alpha: weight of the behaviour-cloning term, likewise; None for 1 in and after an offline phase, and 0 online
        from scratch, where it would clone the policy's own past
    :param n_candidates: actions drawn per stochastic prediction, of which one is picked by its value
    :param n_eval_candidates: fixed noise vectors per deterministic prediction, of which the best action is taken
    :param candidate_selection: "softmax" (probability proportional to exp(Q / temperature)) or "argmax"
    :param candidate_temperature: temperature of the softmax
    :param train_sampling_steps: network evaluations per action inside the losses; None for the acting number
    :param max_q_backup: the target takes the best of 10 next actions, per critic (AntMaze)
    :param q_norm: divide the target by its standard deviation over the batch
    :param actor_q: critic in the Q term: "random" (one raised, another sets the scale), "min" or "mean" of them
    :param normalize_actor_q: divide the Q term by the mean of |Q|
    :param target_policy: actor that supplies the next action: "ema" (its moving average) or "current"
    :param actor_ema_decay: decay of that moving average per update
    :param actor_ema_interval: gradient steps between its updates
    :param actor_ema_start: gradient steps for which it just follows the actor
    :param actor_learning_rate: learning rate of the actor; None for 3e-3 in offline runs, where it falls to 0
        (``cosine_lr_decay``), and ``learning_rate`` online
    """

    #: weights of the two terms at the present gradient step, as tensors: a compiled loss takes numbers for constants
    step_alpha: th.Tensor | None
    step_eta: th.Tensor

    def __init__(
        self,
        *args: Any,
        eta: StepSchedule = 1.0,
        alpha: StepSchedule | None = None,
        n_candidates: int = 50,
        n_eval_candidates: int = 1,
        candidate_selection: str = "softmax",
        candidate_temperature: float = 1.0,
        train_sampling_steps: int | None = None,
        max_q_backup: bool = False,
        q_norm: bool = False,
        actor_q: str = "random",
        normalize_actor_q: bool = True,
        target_policy: str = "ema",
        actor_ema_decay: float = 0.995,
        actor_ema_interval: int = 1,
        actor_ema_start: int = 0,
        **kwargs: Any,
    ) -> None:
        self.eta = eta
        self.alpha = alpha
        self.n_candidates = n_candidates
        self.n_eval_candidates = n_eval_candidates
        self.candidate_selection = candidate_selection
        self.candidate_temperature = candidate_temperature
        self.train_sampling_steps = train_sampling_steps
        self.max_q_backup = max_q_backup
        self.q_norm = q_norm
        self.actor_q = actor_q
        self.normalize_actor_q = normalize_actor_q
        self.target_policy = target_policy
        self.actor_ema_decay = actor_ema_decay
        self.actor_ema_interval = actor_ema_interval
        self.actor_ema_start = actor_ema_start
        super().__init__(*args, **kwargs)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_choice("actor_q", self.actor_q, ACTOR_Q)
        check_choice("target_policy", self.target_policy, TARGET_POLICIES)
        check_choice("candidate_selection", self.candidate_selection, CANDIDATE_SELECTIONS)
        check_flags(max_q_backup=self.max_q_backup, q_norm=self.q_norm, normalize_actor_q=self.normalize_actor_q)
        check_range("eta", self.eta, 0, schedule=True)
        check_range("alpha", self.alpha, 0, optional=True, schedule=True)
        check_range("train_sampling_steps", self.train_sampling_steps, 1, integer=True, optional=True)
        check_range("actor_ema_decay", self.actor_ema_decay, 0, 1)
        check_range("actor_ema_interval", self.actor_ema_interval, 1, integer=True)
        check_range("actor_ema_start", self.actor_ema_start, 0, integer=True)
        check_range("n_candidates", self.n_candidates, 1, integer=True)
        check_range("n_eval_candidates", self.n_eval_candidates, 1, integer=True)
        check_range("candidate_temperature", self.candidate_temperature, 0, open_low=True)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.compile:
            self.policy.compile_choice()

    def losses(self) -> dict[str, LossFn]:
        return {"critic": self.critic_loss, "actor": self.actor_loss}

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        alpha L_bc + eta L_q.

        :param batch: transitions
        :return: loss of the actor, scalars to log
        """
        # once for both terms: of images they cost most of the step
        features = self.policy.actor.features(batch.observations)
        q_loss = self.q_term(batch, features)
        if self.step_alpha is None:
            return self.step_eta * q_loss, {"q_loss": q_loss.detach()}
        bc_loss = self.bc_term(batch, features)
        loss = self.step_alpha * bc_loss + self.step_eta * q_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach()}

    def _update_step_numbers(self) -> None:
        super()._update_step_numbers()
        alpha, eta = self.alpha_now(), self.eta_now()
        self.step_alpha = th.full((), alpha, device=self.device) if alpha != 0 else None
        self.step_eta = th.full((), eta, device=self.device)

    def bc_term(self, batch: Batch, features: th.Tensor) -> th.Tensor:
        """
        :param batch: transitions
        :param features: the actor's features of their observations, (B, F)
        :return: behaviour-cloning term of the actor, scalar
        """
        raise NotImplementedError

    def _actor_rate(self, progress: float) -> float:
        if self.actor_learning_rate is None and self._in_offline_phase:
            return OFFLINE_LEARNING_RATE
        return super()._actor_rate(progress)

    def alpha_now(self) -> float:
        """
        :return: the weight of the behaviour-cloning term at this gradient step
        """
        if self.alpha is None:
            return 1.0 if self._offline_data() is not None or self._was_pretrained else 0.0
        return at_step(self.alpha, self._n_updates)

    def policy_options(self) -> dict[str, Any]:
        options = super().policy_options()
        ema = ("actor_target",) if self.target_policy == "ema" else ()
        return {
            **options,
            "target_networks": (*options["target_networks"], *ema),
            "use_critic": True,
            "n_candidates": self.n_candidates,
            "n_eval_candidates": self.n_eval_candidates,
            "candidate_selection": self.candidate_selection,
            "candidate_temperature": self.candidate_temperature,
        }

    def target_weights(self) -> list[float]:
        weights = super().target_weights()
        if self.target_policy == "ema":
            following = self._n_updates <= self.actor_ema_start
            due = self._n_updates % self.actor_ema_interval == 0
            weights.append(1.0 if following else (1 - self.actor_ema_decay) * due)
        return weights

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

    def q_term(self, batch: Batch, features: th.Tensor) -> th.Tensor:
        """
        Policy-improvement term: raises the value of actions sampled from the actor.

        :param batch: transitions
        :param features: the actor's features of their observations, (B, F)
        :return: L_q = -E[Q_i(s, a)] / E|Q_j(s, a)|, or as ``actor_q`` and ``normalize_actor_q`` say, scalar
        """
        policy = self.policy
        actions = policy.actor.sample(features, self.train_sampling_steps)
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

    def eta_now(self) -> float:
        """
        :return: the weight of the Q term at this gradient step
        """
        return at_step(self.eta, self._n_updates)
