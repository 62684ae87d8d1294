"""Search spaces for tuning: what is sampled follows from what an algorithm's options declare."""

from typing import Any

import optuna

from sb3_consistency.options import Option, options_of

#: user attribute of a trial: whether it learns from a dataset
OFFLINE = "offline"
NET_ARCHS = {"small": [64, 64], "medium": [256, 256], "large": [256, 256, 256], "verybig": [512, 512, 512]}
#: what means something only where critics are trained beside an actor
OF_ACTOR_CRITICS = ("tau", "actor_learning_rate")
#: what has no effect online on an algorithm with a temperature, which is sampled
OF_DATA = ("alpha", "bc_loss", "sampling_steps", "max_q_backup")


def _suggest(trial: optuna.Trial, declared: Option) -> Any:
    search, integer = declared.search, float not in declared.members
    if isinstance(search, list):
        return trial.suggest_categorical(declared.name, search)
    low, high, *scale = search
    if integer:
        return trial.suggest_int(declared.name, low, high)
    return trial.suggest_float(declared.name, low, high, log="log" in scale)


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
    phase = "offline" if trial.user_attrs.get(OFFLINE) else "online"
    # from 2**6 = 64 to 2**10 = 1024
    sampled: dict[str, Any] = {
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 10),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "large"]),
    }
    declared = options_of(cls)
    if not cls.offline_only:
        sampled["one_minus_gamma"] = trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True)
        sampled["layer_norm"] = trial.suggest_categorical("layer_norm", [False, True])
        trial.set_user_attr("gamma", 1 - sampled["one_minus_gamma"])
    for o in declared.values():
        search = o.search.get(phase) if isinstance(o.search, dict) else o.search
        without_effect = cls.offline_only and o.name in OF_ACTOR_CRITICS
        without_effect |= phase == "online" and "ent_coef" in declared and o.name in OF_DATA
        if search is not None and not without_effect:
            sampled[o.name] = _suggest(trial, o.changed(search=search))
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
