r"""Actor-critics: the objective that ConsistencyAC, CPQL and DiffusionQL share."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from sb3_contrib.common.utils import quantile_huber_loss
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule, TensorDict

from sb3_consistency.generative.exploration import ExploringModel
from sb3_consistency.generative.model import GenerativeModel
from sb3_consistency.generative.networks import in_float32
from sb3_consistency.options import StepSchedule, at_step, option, redeclared
from sb3_consistency.policies.modules import Follow, GenerativeCritic, Network
from sb3_consistency.policies.policy import ACTORS, ActingOptions
from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.batches import Batch
from sb3_consistency.training.temperature import TRANSPORT_RATE, Temperature
from sb3_consistency.training.updater import LossFn
from sb3_consistency.values.losses import (
    batch_normalised,
    lowest_quantiles,
    normalised_q_loss,
    pessimistic_value,
    td_target,
    twin_q_loss,
)

ACTOR_Q = ("random", "min", "mean")
MAX_Q_ACTIONS = 10
#: of the actor; a fixed dataset bears more than moving experience, and needs it to be fitted precisely
OFFLINE_LEARNING_RATE = 3e-3
#: of the return, from scratch
N_STEPS = 3
#: of all networks: TD3's, of a policy from scratch that adds noise, and SAC's
FROM_SCRATCH_LEARNING_RATE, LEARNING_RATE = 1e-3, 3e-4
#: likewise
FROM_SCRATCH_POLICY_DELAY, POLICY_DELAY = 2, 1
#: of the number of its moves, which the weights of the average that acts from scratch grow with: most are the last tenth's
AVERAGE_POWER = 9


def last_tenth_share(n_moves: int) -> float:
    """
    Makes an average of the last tenth so far, at any time (Karras et al. 2024, section 3.1).

    :param n_moves: number of moves of a moving average, the present one included
    :return: how far it moves
    """
    return 1 - (1 - 1 / n_moves) ** (AVERAGE_POWER + 1)


class ActorCritic(ActingOptions, GenerativeAlgorithm):
    r"""
    An actor that the critics raise and a reference holds, critics trained by temporal differences.

    In and after an offline phase the reference is the data:

    .. math::

        L_\mathrm{actor} &= \alpha L_\mathrm{bc}(s, a) + \eta L_q, \qquad
        L_q = -\frac{\mathbb{E}\, Q_i(s, \hat a)}{\mathrm{sg}\, \mathbb{E} |Q_j(s, \hat a)|}, \quad \hat a \sim \pi(s) \\
        L_\mathrm{critic} &= \sum_j \mathbb{E} (Q_j(s, a) - y)^2, \qquad
        y = r + \gamma (1 - d) \min_j Q'_j(s', a'), \quad a' \sim \pi'(s')

    Source: Ding & Jin 2024, section 4.2; Wang et al. 2022. :math:`L_\mathrm{bc}` is the generative model's own loss.

    Online, unless ``ent_coef`` is 0, noise is added. After an offline phase its entropy is ``target_entropy`` in all states,

    .. math::

        a = \mathrm{clip}(f(z, s) + \sigma \epsilon), \qquad \log \sigma = \bar H / d - \log(2 \pi e) / 2

    (:math:`\bar H` of d dimensions). From scratch its deviation is learned, with a temperature w. In one pass, with nothing
    to clone, it is SAC's policy whose mean depends on the noise z, too:

    .. math::

        a &= \tanh(F(z, s) + \sigma(s)\, \epsilon), \qquad L = w \log \pi(a | s, z) - \eta\, Q(s, a) \\
        y &= r + \gamma (1 - d) (\min_j Q'_j(s', a') - w \log \pi(a' | s', z')), \quad a' \sim \pi(s')

    Source: Haarnoja et al. 2018 (SAC). Deterministic actions are those of the actor's moving average, over the last tenth of
    training (Karras et al. 2024). With ``exploration="transport"`` the noise is carried from scratch instead, as little
    as the values allow. A cost takes the place of the log-probability:

    .. math::

        a &= \tanh u, \qquad u = z + v(z, s), \qquad z \sim N(0, 1) \text{ clipped to } [-1, 1] \\
        c(s) &= \mathrm{Var}_z\, v(z, s) / 2 + \kappa\, |\mathbb{E}_z\, v(z, s)|^2 / 2, \qquad
        \hat H = \textstyle\sum_i (\mathbb{E} \log |u_i - u'_i| + \mathrm{const})

    Source: FLAC (arXiv 2602.12829), whose temperature aims at a cost instead: one that allows actions at their bounds
    (Pendulum) lets noise die where they are not needed (Hopper). Ours aims at SAC's entropy, of u, estimated by how far
    two of a state lie apart. :math:`\kappa` is ``shift_cost``; with 1, as there, c is the mean of |v|^2 / 2.

    Whether a model is one of the data or from scratch, its first gradient step decides.
    """

    model_class: ClassVar[type[GenerativeModel]]

    n_candidates: int | None = None
    learning_rate: float | Schedule | None = redeclared(  # type: ignore[assignment]  # likewise
        GenerativeAlgorithm,
        "learning_rate",
        default=None,
        kw_only=False,
        doc="learning rate of all networks, or a schedule of the progress remaining (from 1 to 0); None for 1e-3 of a model "
        'that is given no ``dataset`` and has a temperature with ``exploration="gaussian"``, and else for 3e-4',
    )
    n_steps: int | None = redeclared(  # type: ignore[assignment]  # a number, once it is built
        GenerativeAlgorithm,
        "n_steps",
        default=None,
        doc="steps of the n-step return; None for 3 of a policy that learns online from scratch with a temperature, where the "
        "replay buffer has them (SB3's own, no Dict observations, no chunks), and else for 1",
    )
    eta: StepSchedule = option(
        default=1.0, low=0, doc="weight of the Q term, a number or a function of the gradient step", search=(0.01, 10.0, "log")
    )
    alpha: StepSchedule | None = option(
        default=None,
        low=0,
        doc="weight of the behaviour-cloning term, likewise; None for 1 in and after an offline phase, and 0 online from "
        "scratch, where it would clone the policy's own past (with a temperature there is no such term)",
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
    actor_q: str | None = option(
        default=None,
        one_of=ACTOR_Q,
        doc='critic in the Q term: "random" (one raised, another sets the scale), "min" or "mean" of them; None for "random", '
        'from scratch "min", of quantiles "mean"',
    )
    top_quantiles_to_drop_per_net: int = option(
        default=2,
        low=0,
        before=2,
        doc="of ``policy_kwargs=dict(n_quantiles=25)``, as of TQC: the highest of each critic, which the target leaves out",
    )
    normalize_actor_q: bool = option(
        default=True, doc="divide the Q term by the mean of |Q|; not with a temperature, which is balanced against Q itself"
    )
    target_policy: str = option(
        default="ema",
        one_of=ACTORS,
        fixed=True,
        doc='actor that supplies the next action: "ema" (its moving average) or "current"; with a temperature the current one',
    )
    policy_delay: int | None = option(
        default=None,
        low=1,
        before=1,
        size=False,
        doc="gradient steps of the critics per one of the actor, as of TD3; None for 2 of a policy that learns online from "
        'scratch, with a temperature and ``exploration="gaussian"``, and else for 1. ``gradient_steps=2, policy_delay=2`` '
        "trains the critics twice per environment step, and the actor once",
    )
    actor_ema_decay: float = option(default=0.995, low=0, high=1, doc="decay of that moving average per update")
    actor_ema_interval: int = option(default=1, low=1, doc="updates of the actor from one of its own to the next")
    actor_ema_start: int = option(default=0, low=0, size=False, doc="gradient steps for which it just follows the actor")
    #: of those that have a temperature, see :class:`~sb3_consistency.training.temperature.TemperatureOptions`
    ent_coef: str | float = option(init=False)
    target_entropy: str | float = option(init=False)
    shift_cost: float = option(init=False)
    exploration: str = option(init=False)
    temperature: Temperature = option(init=False)
    #: weights of the terms at the present gradient step, as tensors: a compiled loss takes numbers for constants
    step_alpha: th.Tensor | None = option(init=False)
    step_eta: th.Tensor = option(init=False)
    step_ent_coef: th.Tensor = option(init=False)
    _batch: Batch | None = option(init=False)

    def networks(self) -> Mapping[str, Network]:
        targets = {}
        if self.target_policy == "ema":
            targets["actor_target"] = Follow(self._actor_share(), start=self.actor_ema_start)
        critic = Network(GenerativeCritic, {}, {"critic_target": Follow(self.tau, self.target_update_interval)})
        return {"actor": self.actor_network(**targets), "critic": critic}

    def _actor_share(self) -> float:
        """How far the actor's moving average moves in this gradient step."""
        n_moves, rest = divmod(self._n_updates // self.actor_period + 1, self.actor_ema_interval)
        if not self.is_actors_turn or rest:
            return 0.0
        if self.is_from_scratch:
            return last_tenth_share(n_moves)  # no target needs the average, it acts
        return 1 - self.actor_ema_decay

    def actor_network(self, **targets: Follow) -> Network:
        network = super().actor_network(**targets)
        # what a policy that is saved alone needs to act as it does
        return network.of_model(form=self.form) if issubclass(self.model_class, ExploringModel) else network

    def _own_arguments(self) -> set[str]:
        return {*super()._own_arguments(), "form"}

    def losses(self) -> Mapping[str, LossFn]:
        return {"critic": self.critic_loss, **({"actor": self.actor_loss} if self.is_actors_turn else {})}

    @property
    def is_actors_turn(self) -> bool:
        """Whether the present gradient step is one of the actor's, too."""
        return self._n_updates % self.actor_period == 0

    @property
    def actor_period(self) -> int:
        """Gradient steps of the critics per one of the actor, at present."""
        if self.policy_delay is None:
            return FROM_SCRATCH_POLICY_DELAY if self.form == "squashed" else POLICY_DELAY
        return self.policy_delay

    def actor_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        alpha L_bc + eta L_q; from scratch eta L_q + w c, with the cost c of exploring.

        :param batch: transitions
        :return: loss of the actor, scalars to log
        """
        actor = self.policy.actor
        # once for all terms: of images they cost most of the step
        features = actor.features(batch.observations)
        if self.is_from_scratch:
            explored = actor.explore(features, self.shift_cost)
            q_loss, cost = self.q_term(batch, explored.actions), explored.cost.mean()
            loss = self.step_ent_coef * cost + self.step_eta * q_loss
            told = {"q_loss": q_loss, "entropy": explored.entropy.mean(), "ent_coef": self.step_ent_coef}
            told |= {"transport_cost": cost} if self.form == "transport" else {}
        else:
            noise = self.actor_noise(features)
            actions = actor.model.denoise(noise, features)
            # the values are those of what acts
            acting = actor.model.spread(actions, th.randn_like(actions), features).actions if self.form == "added" else actions
            q_loss = self.q_term(batch, acting)
            loss, told = self.step_eta * q_loss, {"q_loss": q_loss}
            if self.step_alpha is not None:
                bc_loss = self.bc_term(batch, features, noise, actions)
                loss, told = self.step_alpha * bc_loss + loss, {"bc_loss": bc_loss, **told}
        return loss, {name: value.detach() for name, value in told.items()}

    def actor_noise(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: the actor's features of the observations, (B, F)
        :return: noise that the actor learns from, of its passes, (S, B, A)
        """
        noise = self.policy.actor.noise(features, self.train_sampling_steps)
        return noise[: len(noise) - self.policy.actor.model.n_added]

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
        policy, normalise = self.policy, self.normalize_actor_q and not self.is_from_scratch
        with th.no_grad():
            critic_features = policy.critic.features(batch.observations)
        kind = self.actor_q or ("mean" if policy.n_quantiles > 1 else "min" if self.is_from_scratch else "random")
        if kind == "random" and policy.n_critics > 1:
            # only the critic that is raised needs a backward pass
            raised_one, scale_one = th.rand(policy.n_critics, device=self.device).argsort()[:2].split(1)
            raised = policy.critic.q_networks(critic_features, actions, raised_one)
            with th.no_grad():
                scale = policy.critic.q_networks(critic_features, actions, scale_one) if normalise else raised
        else:
            q_values = policy.critic.q_networks(critic_features, actions)
            raised = scale = q_values.mean(dim=1) if kind == "mean" else q_values.amin(dim=1)
        return normalised_q_loss(raised, scale) if normalise else -raised.mean()

    def critic_loss(self, batch: Batch) -> tuple[th.Tensor, TensorDict]:
        """
        Mean squared temporal-difference error, summed over the critics; of quantiles their regression (Kuznetsov et al. 2020).

        :param batch: transitions
        :return: loss of the critics, scalars to log
        """
        with th.no_grad():
            target = td_target(batch.rewards, batch.dones, batch.discounts, self.next_value(batch))
            if self.q_norm:
                target = batch_normalised(target)
        if self.policy.n_quantiles > 1:
            quantiles = self.policy.critic.quantiles(batch.observations, batch.actions)
            loss = quantile_huber_loss(quantiles, target.unsqueeze(1), sum_over_quantiles=False)
            return loss, {"q_value": quantiles.detach().mean()}
        q_values = self.policy.critic(batch.observations, batch.actions)
        return twin_q_loss(q_values, target), {"q_value": q_values.detach().mean()}

    def next_value(self, batch: Batch) -> th.Tensor:
        """
        :param batch: transitions
        :return: what :meth:`target_value` says of the next state, from scratch less the cost of exploring
        """
        obs = batch.next_observations
        if self.is_from_scratch:
            explored = self.policy.actor.explore(self.policy.actor.features(obs), self.shift_cost)
            return self.target_value(obs, explored.actions) - self.step_ent_coef * explored.cost
        actor = getattr(self.policy, "actor_target" if self.target_policy == "ema" else "actor")
        if not self.max_q_backup:
            return self.target_value(obs, actor.sample(actor.features(obs), self.train_sampling_steps))
        critic = self.policy.critic_target
        features, critic_features = (x.features(obs).repeat_interleave(MAX_Q_ACTIONS, dim=0) for x in (actor, critic))
        actions = actor.sample(features, self.train_sampling_steps)
        # as they are rounded in bfloat16, the highest would be the one rounded up
        q_values = in_float32(critic.q_networks, critic_features, actions)
        best = q_values.unflatten(0, (-1, MAX_Q_ACTIONS)).amax(dim=1)
        return pessimistic_value(best, self._random_pair())

    def target_value(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations, (B, ...)
        :param actions: scaled actions in them, (B, A)
        :return: pessimistic value under the target critics, (B, 1), or the K lower ones of their quantiles, (B, K)
        """
        critic = self.policy.critic_target
        if self.policy.n_quantiles > 1:
            return lowest_quantiles(critic.quantiles(obs, actions), self.top_quantiles_to_drop_per_net)
        return pessimistic_value(critic(obs, actions), self._random_pair())

    def _random_pair(self) -> th.Tensor | None:
        n_critics = self.policy.n_critics
        return th.rand(n_critics, device=self.device).argsort()[:2] if n_critics > 2 else None

    def take_defaults(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = FROM_SCRATCH_LEARNING_RATE if self.form == "squashed" else LEARNING_RATE
        if self.n_steps is None:
            own_buffer = self.replay_buffer_class is not None or self.optimize_memory_usage
            # load() has no space yet, and the file's number of steps
            is_dict = isinstance(getattr(self, "observation_space", None), spaces.Dict)
            has_them = not (own_buffer or self.has_windows or is_dict)
            self.n_steps = N_STEPS if self.is_from_scratch and has_them else 1

    # the temperature

    @property
    def has_temperature(self) -> bool:
        """Whether it is to have one from scratch: of a subclass without the option it has none."""
        return getattr(self, "ent_coef", 0.0) != 0

    @property
    def is_from_scratch(self) -> bool:
        """Whether it learns online from scratch, with a temperature; before the first gradient step, without a ``dataset``."""
        from_scratch = not self.run.began_with_data if self.run.from_scratch is None else self.run.from_scratch
        return from_scratch and self.has_temperature

    @property
    def form(self) -> str:
        """What kind of policy it is, see :class:`~sb3_consistency.generative.exploration.ExploringModel`."""
        if self.is_from_scratch:
            return "squashed" if self.exploration == "gaussian" else "transport"
        return "added" if self.has_temperature and self.run.explores and self.exploration != "none" else "plain"

    @property
    def policy_defaults(self) -> dict[str, Any]:
        # SAC's networks in SAC's place
        takes_its_place = self.has_temperature and not self.run.began_with_data
        sacs = {"net_arch": [256, 256], "activation_fn": th.nn.ReLU} if takes_its_place else {}
        return {**super().policy_defaults, **sacs}

    @property
    def ent_coef_tensor(self) -> th.Tensor:
        """The temperature at present, scalar."""
        return self.temperature.value()

    @property
    def log_ent_coef(self) -> th.Tensor | None:
        """Its logarithm, if it is learned, (1,)."""
        return self.temperature.log

    @property
    def ent_coef_optimizer(self) -> th.optim.Optimizer | None:
        """What learns it."""
        return self.temperature.optimizer

    @property
    def entropy_aim(self) -> float:
        """Entropy that a learned temperature aims at, and that of noise which is added after an offline phase."""
        if self.target_entropy == "auto":
            return -float(math.prod(self.policy.actor.model.event_shape))
        return float(self.target_entropy)

    def check_together(self) -> None:
        super().check_together()
        if self.is_built:
            self._check_quantiles()

    def _check_quantiles(self) -> None:
        n_quantiles = self.policy.n_quantiles
        if n_quantiles == 1:
            return
        dropped = self.top_quantiles_to_drop_per_net
        if dropped >= n_quantiles:
            raise ValueError(
                f"top_quantiles_to_drop_per_net must be below n_quantiles, {n_quantiles}, or none are left, got {dropped}."
            )
        for name in ("q_norm", "max_q_backup"):
            if getattr(self, name):
                raise ValueError(f"{name} must be False with critics of quantiles (n_quantiles={n_quantiles}), got True.")

    def _setup_model(self) -> None:
        super()._setup_model()
        self._check_quantiles()
        rate = 1.0 if getattr(self, "exploration", "") == "gaussian" else TRANSPORT_RATE
        self.temperature = Temperature(getattr(self, "ent_coef", 0.0), self.lr_schedule(1), rate, self.device)
        self._batch = None

    @property
    def _acting_models(self) -> list[ExploringModel]:
        actors = (getattr(self.policy, name, None) for name in ("actor", "actor_target"))
        return [actor.model for actor in actors if actor is not None and isinstance(actor.model, ExploringModel)]

    def _take_form(self) -> None:
        """Tell the networks what kind of policy they have become."""
        for model in self._acting_models:
            model.form = self.form
        self.updater.forget()

    def _begin_to_explore(self) -> None:
        """The first online gradient step: after an offline phase noise is added from now on."""
        self.run.explores = True
        self._take_form()
        self._spread_as_told()

    def _spread_as_told(self) -> None:
        """Noise that is added after an offline phase has the entropy that is aimed at."""
        if self.form == "added":
            for model in self._acting_models:
                model.start_spread(self.entropy_aim / math.prod(model.event_shape))

    def option_changed(self, name: str, value: Any) -> None:
        super().option_changed(name, value)
        if name == "target_entropy":
            self._spread_as_told()

    def enter_loop(self) -> None:
        super().enter_loop()
        self._spread_as_told()  # load() may have been given another

    def gradient_step(self, batch: Any) -> TensorDict:
        if self.run.from_scratch is None:
            self.run.from_scratch = not self.in_offline_phase
            self._take_form()
            idle = {"alpha": (None, 0), "max_q_backup": (False,), "train_sampling_steps": (None,)}
            for name in [n for n, without in idle.items() if self.is_from_scratch and getattr(self, n) not in without]:
                warnings.warn(
                    f"{name}={getattr(self, name)} has no effect on a policy that learns online from scratch, in one pass and "
                    "with nothing to clone; with ent_coef=0 it has.",
                    stacklevel=2,
                )
        if not (self.in_offline_phase or self.run.explores):
            self._begin_to_explore()
        if not self.in_offline_phase:  # whose logs have no spread; a batch kept holds those drawn together with it
            self._batch = batch
        metrics = super().gradient_step(batch)
        if "entropy" in metrics:
            self.temperature.step(metrics["entropy"], self.entropy_aim)
        return metrics

    def dump_logs(self) -> None:
        if self._batch is not None:
            of_all, of_z = self.policy.actor.action_stds(self._batch.observations)
            self.logger.record("train/action_std", of_all)
            self.logger.record("train/action_std_z", of_z)
        super().dump_logs()

    # the weights

    def prepare_step(self) -> None:
        super().prepare_step()
        alpha, eta = self.alpha_now(), at_step(self.eta, self._n_updates)
        self.step_alpha = th.full((), alpha, device=self.device) if alpha != 0 else None
        self.step_eta = th.full((), eta, device=self.device)
        self.step_ent_coef = self.temperature.value()

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

    def update_learning_rates(self) -> None:
        super().update_learning_rates()
        self.temperature.set_learning_rate(self.policy.critic.optimizer.param_groups[0]["lr"])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "temperature", "step_alpha", "step_eta", "step_ent_coef", "_batch"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return (
            (names, variables) if self.log_ent_coef is None else ([*names, "ent_coef_optimizer"], [*variables, "log_ent_coef"])
        )
