"""Arguments under names that nothing has, or in the wrong place: what is known, and where they belong."""

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_consistency.options import check_class, check_type

NOT_OURS = {
    "ent_coef": "there is no entropy term; use eta, alpha or action_noise",
    "target_entropy": "there is no entropy term",
    "use_sde": "exploration comes from sampling the generative policy",
    "sde_sample_freq": "exploration comes from sampling the generative policy",
    "use_sde_at_warmup": "exploration comes from sampling the generative policy",
    "policy_delay": "actor and critic are updated together",
    "target_policy_noise": "the next action is sampled from the policy",
    "target_noise_clip": "the next action is sampled from the policy",
}
# what a policy gives its networks' models, and an algorithm its policy
NOT_FROM_OUTSIDE = {"observation_space", "action_space", "lr_schedule", "event_shape", "action_dim", "cond_dim"}
POLICY_CLASSES = {
    "activation_fn": th.nn.Module,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}


def argument_names(cls: type[Any]) -> set[str]:
    """
    :param cls: a class of this package, or derived from one
    :return: names of its constructor's arguments; those that it hands on to the bases included, to SB3's and PyTorch's not
    """
    ours = [base for base in cls.__mro__ if not base.__module__.startswith(("stable_baselines3.", "torch.", "builtins"))]
    inits = [vars(base)["__init__"] for base in ours if "__init__" in vars(base)]
    parameters = [p for init in inits for p in list(inspect.signature(init).parameters.values())[1:]]
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def did_you_mean(name: object, known: Collection[str]) -> str:
    """
    :param name: an unknown name
    :param known: the known ones
    :return: end of a message, with the nearest of them if there is one
    """
    close = get_close_matches(str(name), known, 1)
    return f"; did you mean {close[0]!r}?" if close else ";"


def check_keys(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """
    :param where: the argument that holds them, for the message
    :param given: arguments by name
    :param known: names allowed
    :raises TypeError: if one is unknown
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{where}: unknown {name!r}{did_you_mean(name, known)} known: {', '.join(sorted(known))}.")


def reject_unknown(cls: type[Any], unknown: Mapping[str, Any]) -> None:
    """
    :param cls: the algorithm
    :param unknown: arguments that its constructor does not have
    :raises TypeError: if there are any; it says where they belong, or what to use in place of SAC's and TD3's own
    """
    for name in unknown:
        raise TypeError(f"{cls.__name__}() got an unexpected argument {name!r}{_where_it_belongs(cls, name)}")


def _where_it_belongs(cls: type[Any], name: str) -> str:
    from sb3_consistency import registry

    if name in NOT_OURS:
        return f": {NOT_OURS[name]}."
    others = [other for other in registry.ALGORITHMS if name in argument_names(registry.algorithm(other))]
    if others:
        return f"; it belongs to {', '.join(others)}."
    if name in argument_names(cls.policy_aliases["MlpPolicy"]):
        return f"; it goes into policy_kwargs=dict({name}=...)."
    return did_you_mean(name, argument_names(cls)).rstrip(";") or "."


def check_policy_kwargs(
    cls: type[Any],
    policy_class: type[BasePolicy],
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    models: Mapping[str, type[Any]],
    new: bool,
) -> None:
    """
    :param cls: the algorithm
    :param policy_class: its policy; what one that is not this package's takes is not known
    :param given: ``policy_kwargs``
    :param options: what the algorithm passes to the policy itself; of these only the ``model_kwargs`` are merged
    :param models: entry of ``policy_kwargs`` -> class of the model whose arguments it holds
    :param new: whether they are a new model's; in files of before, the policy's may lie among a model's
    :raises TypeError: if one is unknown, the algorithm's own or in the wrong dict, or no class where one is wanted
    """
    own = {*options, *options["model_kwargs"]} - {"model_kwargs"}
    of_policy = argument_names(cls.policy_aliases["MlpPolicy"]) - own
    places = {"policy_kwargs": (given, policy_class)}
    for name, model in models.items():
        check_type(f"policy_kwargs: {name}", given.get(name), dict, "a dict")
        places[f"policy_kwargs[{name!r}]"] = (given.get(name) or {}, model)
    for where, (entries, taker) in places.items():
        for name in own & entries.keys():
            belongs = f"pass {name} to {cls.__name__} itself" if name in argument_names(cls) else f"{cls.__name__} sets {name}"
            raise TypeError(f"{where}: {belongs}.")
        known = argument_names(taker) - NOT_FROM_OUTSIDE - own
        if taker is not policy_class and new:
            for name in of_policy & entries.keys():
                raise TypeError(f"{where}: {name} is the policy's: pass policy_kwargs=dict({name}=...).")
            known -= of_policy
        if taker is not policy_class or policy_class in cls.policy_aliases.values():
            check_keys(where, entries, known)
    for name in POLICY_CLASSES.keys() & given.keys():
        check_class(f"policy_kwargs: {name}", given[name], POLICY_CLASSES[name])
