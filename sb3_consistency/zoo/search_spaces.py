"""Search spaces for tuning: what is sampled follows from what an algorithm is made of."""

from collections.abc import Callable
from typing import Any

import optuna

from sb3_consistency.algorithms.actor_critic import GenerativeActorCritic
from sb3_consistency.algorithms.consistency import ConsistencyPolicyMixin
from sb3_consistency.algorithms.cpql import CPQL
from sb3_consistency.algorithms.diffusion import DiffusionPolicyMixin
from sb3_consistency.algorithms.ractd import RACTD
from sb3_consistency.training.algorithm import GenerativeAlgorithm

Space = Callable[[optuna.Trial], dict[str, Any]]

#: user attribute of a trial: whether it learns from a dataset
OFFLINE = "offline"
NET_ARCHS = {"small": [64, 64], "medium": [256, 256], "large": [256, 256, 256], "verybig": [512, 512, 512]}


def _shared(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        # from 2**6 = 64 to 2**10 = 1024
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 10),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.5, 10.0, log=True),
        "cosine_lr_decay": trial.suggest_categorical("cosine_lr_decay", [False, True]),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "large"]),
    }


def _consistency(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "bc_loss": trial.suggest_categorical("bc_loss", ["ict", "consistency", "reconstruction"]),
        "sampling_steps": trial.suggest_int("sampling_steps", 1, 3),
    }


def _diffusion(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "diffusion_steps": trial.suggest_int("diffusion_steps", 2, 10),
        "beta_schedule": trial.suggest_categorical("beta_schedule", ["vp", "cosine"]),
        "sampler": trial.suggest_categorical("sampler", ["ddpm", "ddim"]),
    }


def _actor_critic(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        "actor_learning_rate": trial.suggest_float("actor_learning_rate", 1e-5, 1e-2, log=True),
        "eta": trial.suggest_float("eta", 0.01, 10.0, log=True),
        **(_with_data(trial) if trial.user_attrs.get(OFFLINE) else _from_scratch(trial)),
        "q_norm": trial.suggest_categorical("q_norm", [False, True]),
        "max_q_backup": trial.suggest_categorical("max_q_backup", [False, True]),
        "layer_norm": trial.suggest_categorical("layer_norm", [False, True]),
    }


def _with_data(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "alpha": trial.suggest_float("alpha", 0.001, 1.0, log=True),
        # trials are evaluated deterministically: n_candidates would change nothing
        "n_eval_candidates": trial.suggest_categorical("n_eval_candidates", [1, 5, 20]),
    }


def _from_scratch(trial: optuna.Trial) -> dict[str, Any]:
    return {
        # 0 is the default, and on no logarithmic scale
        "alpha": trial.suggest_categorical("alpha", [0.0, 0.005, 0.05, 0.5]),
        # of the actions that experience is collected with
        "n_candidates": trial.suggest_categorical("n_candidates", [1, 10, 50]),
    }


def _cpql(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "value_mode": trial.suggest_categorical("value_mode", ["q", "iql"]),
        "expectile": trial.suggest_float("expectile", 0.5, 0.95),
    }


def _ractd(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "beta": trial.suggest_float("beta", 0.1, 10.0, log=True),
        "reward_weight": trial.suggest_float("reward_weight", 0.01, 1.0, log=True),
        "teacher_steps": trial.suggest_float("teacher_steps", 0.2, 0.6),
        "sampling_steps": trial.suggest_categorical("sampling_steps", [1, 2]),
    }


# an algorithm samples what all its base classes do
SPACES: dict[type[Any], Space] = {
    GenerativeAlgorithm: _shared,
    ConsistencyPolicyMixin: _consistency,
    DiffusionPolicyMixin: _diffusion,
    GenerativeActorCritic: _actor_critic,
    CPQL: _cpql,
    RACTD: _ractd,
}


def sample(
    cls: type[Any], trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sample hyperparameters, as rl-zoo3's ``HYPERPARAMS_SAMPLER`` do.

    :param cls: class of the algorithm
    :param trial: trial of the study, whose user attribute :data:`OFFLINE` says whether it learns from a dataset
    :param n_actions: size of an action
    :param n_envs: number of environments
    :param additional_args: rl-zoo3's, on HER
    :return: constructor arguments
    """
    sampled: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base in SPACES:
            sampled |= SPACES[base](trial)
    if "one_minus_gamma" in sampled:
        trial.set_user_attr("gamma", 1 - sampled["one_minus_gamma"])
    trial.set_user_attr("batch_size", 2 ** sampled["batch_size_pow"])
    if additional_args.get("using_her_replay_buffer"):
        sampled["n_sampled_goal"] = trial.suggest_int("n_sampled_goal", 1, 5)
        strategies = ["final", "episode", "future"]
        sampled["goal_selection_strategy"] = trial.suggest_categorical("goal_selection_strategy", strategies)
    return convert(sampled)


def convert(sampled: dict[str, Any]) -> dict[str, Any]:
    """
    Turn the parameters of a trial into constructor arguments, as rl-zoo3's ``HYPERPARAMS_CONVERTER`` do.

    :param sampled: what was suggested (a trial's ``params``)
    :return: constructor arguments
    """
    params = dict(sampled)
    if "one_minus_gamma" in params:
        params["gamma"] = 1 - params.pop("one_minus_gamma")
    params["batch_size"] = 2 ** params.pop("batch_size_pow")
    policy_kwargs: dict[str, Any] = {"net_arch": NET_ARCHS[params.pop("net_arch")]}
    if "layer_norm" in params:
        policy_kwargs["layer_norm"] = params.pop("layer_norm")
    if params.get("bc_loss") == "consistency":
        # without it the loss is too small beside the Q term
        params["loss_scaling"] = True
    her = {key: params.pop(key) for key in ("n_sampled_goal", "goal_selection_strategy") if key in params}
    return {**params, "policy_kwargs": policy_kwargs, **({"replay_buffer_kwargs": her} if her else {})}
