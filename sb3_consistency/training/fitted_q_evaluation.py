"""What a policy is worth, told from data: fitted Q evaluation on held-out episodes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.options import check_keys, check_range
from sb3_consistency.policies.modules import GenerativeCritic, Network, in_parts
from sb3_consistency.training.batches import tree_map
from sb3_consistency.training.offline_data import heldout_tensor
from sb3_consistency.values.losses import td_target, twin_q_loss

#: rows whose actions are computed at a time
ROWS = 4096


def fitted_q_evaluation(
    model: Any,
    gradient_steps: int = 10_000,
    learning_rate: float = 1e-3,
    target_share: float = 0.05,
    batch_size: int = 256,
    deterministic: bool = True,
    seed: int = 0,
) -> float:
    r"""
    Estimate the discounted return of a model's policy on episodes that it was not trained on, without an environment.

    A critic of the policy's architecture is fitted to the held-out transitions by temporal differences,

    .. math:: \min_Q \mathbb{E}\, (Q(s, a) - r - \gamma (1 - d)\, Q'(s', \pi(s')))^2,

    and asked at the first states of the episodes for the mean of :math:`Q(s_0, \pi(s_0))`. Use it to choose among models of
    the same data: its ranking can be trusted further than its value. What :math:`\pi` does off the data is guessed.
    The model's random numbers stay as they are.

    Source: Le et al. 2019 (FQE); Paine et al. 2020 for choosing hyperparameters offline by it.

    :param model: a model with held-out episodes (``load_dataset(..., heldout_fraction=0.1)``)
    :param gradient_steps: of the critic
    :param learning_rate: of the critic; it falls to 0 along a cosine
    :param target_share: how far Q' moves towards Q in a step: ``gradient_steps * target_share`` is about how many steps ahead
        the estimate looks, which should be several times :math:`1 / (1 - \gamma)`
    :param batch_size: transitions of a step
    :param deterministic: whether to evaluate the deterministic policy; else actions are sampled anew in every step
    :param seed: of the critic's first weights and of the batches
    :return: the estimate, in the rewards that the model learns from (after ``reward_transform``)
    :raises DatasetError: if no episodes with rewards are held out
    :raises ValueError: if an argument is out of its range
    """
    check_range("gradient_steps", gradient_steps, 1, integer=True)
    check_range("learning_rate", learning_rate, 0, open_low=True)
    check_range("target_share", target_share, 0, 1, open_low=True)
    check_range("batch_size", batch_size, 1, integer=True)
    policy, device = model.policy, model.device
    data = _heldout(model)
    trained = policy.training
    policy.set_training_mode(False)
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        th.manual_seed(seed)
        rng = np.random.default_rng(seed)
        # with a features extractor of its own, or nothing would train that one
        kwargs = {"n_critics": 1, "n_quantiles": 1, "share_features_extractor": False}
        critic, target = (policy.new_network(Network(GenerativeCritic, kwargs)) for _ in range(2))
        critic.obs_normalizer.load_state_dict(policy.actor.obs_normalizer.state_dict())
        target.load_state_dict(critic.state_dict())
        fixed_actions = _actions(policy, data["next_observations"], True) if deterministic else None
        optimizer = th.optim.Adam(critic.parameters(), lr=learning_rate)
        decay = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, gradient_steps)
        for _ in range(gradient_steps):
            rows = th.as_tensor(rng.integers(len(data["actions"]), size=batch_size), device=device)
            batch = tree_map(lambda x, rows=rows: x[rows], data)
            following = batch["next_observations"]
            with th.no_grad():
                actions = _actions(policy, following, False) if fixed_actions is None else fixed_actions[rows]
                wanted = td_target(batch["rewards"], batch["terminations"], model.gamma, target(following, actions))
            optimizer.zero_grad()
            twin_q_loss(critic(batch["observations"], batch["actions"]), wanted).backward()
            optimizer.step()
            decay.step()
            with th.no_grad():
                th._foreach_lerp_(list(target.parameters()), list(critic.parameters()), target_share)
        starts = th.as_tensor(np.flatnonzero(model.data.heldout["starts"]), device=device)
        first = tree_map(lambda x: x[starts], data["observations"])
        with th.no_grad():
            value = float(critic(first, _actions(policy, first, deterministic)).mean())
    policy.set_training_mode(trained)
    return value * _scale(model)


def _check_heldout(model: Any) -> None:
    heldout = model.data.heldout
    if heldout is None:
        raise DatasetError(
            "fitted Q evaluation: no episodes are held out; load the data with load_dataset(..., heldout_fraction=0.1)."
        )
    if "next_observations" not in heldout:
        raise ValueError("fitted Q evaluation takes policies of single observations and actions, not of chunks or histories.")
    if heldout["rewards"] is None:
        raise DatasetError("fitted Q evaluation: the held-out episodes have no rewards.")


def _heldout(model: Any) -> dict[str, Any]:
    """Observations as networks take them, actions (N, A), terminations and rewards (N, 1), these of the critics' size."""
    _check_heldout(model)
    heldout = model.data.heldout

    def column(x: np.ndarray) -> th.Tensor:
        return th.as_tensor(x, dtype=th.float32, device=model.device).unsqueeze(1)

    return {
        **{name: heldout_tensor(model, heldout[name]) for name in ("observations", "next_observations")},
        "actions": th.as_tensor(heldout["actions"], device=model.device),
        "rewards": column(_rewards(model) / _scale(model)),
        "terminations": column(heldout["terminations"]),
    }


def _rewards(model: Any) -> np.ndarray:
    rewards, function = model.data.heldout["rewards"], model.run.reward_function
    return np.asarray(rewards if function is None else function(rewards.copy()), np.float32)


def _scale(model: Any) -> float:
    """Size of the values: divided by it, one learning rate fits all."""
    return max(float(np.abs(_rewards(model)).mean()), 1e-6) / max(1 - model.gamma, 1e-3)


@th.no_grad()
def _actions(policy: Any, obs: PyTorchObs, deterministic: bool) -> th.Tensor:
    """Scaled actions, (B, A), a part of the rows at a time."""
    return in_parts(lambda part: policy._predict(part, deterministic), obs, ROWS)


class FittedQEvaluationCallback(BaseCallback):
    """
    Log :func:`fitted_q_evaluation` as ``eval/fqe``, every so many steps and at the end of training.

    :param eval_freq: steps between two evaluations (gradient steps in an offline phase); None for the end alone
    :param kwargs: arguments of :func:`fitted_q_evaluation`
    :ivar evaluations_timesteps: steps of the evaluations so far
    :ivar evaluations_results: their values
    """

    def __init__(self, eval_freq: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        check_range("eval_freq", eval_freq, 1, integer=True, optional=True)
        check_keys("FittedQEvaluationCallback", kwargs, inspect.signature(fitted_q_evaluation).parameters.keys() - {"model"})
        self.eval_freq, self.kwargs = eval_freq, kwargs
        self.evaluations_timesteps: list[int] = []
        self.evaluations_results: list[float] = []

    def _on_training_start(self) -> None:
        # before hours of training, rather than after
        _check_heldout(self.model)

    def _on_step(self) -> bool:
        if self.eval_freq is not None and self.n_calls % self.eval_freq == 0:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        if self.num_timesteps not in self.evaluations_timesteps[-1:]:
            self._evaluate()

    def _evaluate(self) -> None:
        value = fitted_q_evaluation(self.model, **self.kwargs)
        self.evaluations_timesteps.append(self.num_timesteps)
        self.evaluations_results.append(value)
        self.logger.record("eval/fqe", value)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
