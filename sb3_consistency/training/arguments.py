"""The arguments that all algorithms share, and what is said of those that none has."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TrainFrequencyUnit

from sb3_consistency import registry
from sb3_consistency.options import (
    Options,
    argument_names,
    check_class,
    check_keys,
    check_range,
    check_type,
    did_you_mean,
    option,
)
from sb3_consistency.training.gradient import PRECISIONS

ON_DIVERGENCE = ("stop", "continue")

NOT_OURS = {
    "use_sde": "exploration comes from sampling the generative policy",
    "sde_sample_freq": "exploration comes from sampling the generative policy",
    "use_sde_at_warmup": "exploration comes from sampling the generative policy",
    "target_policy_noise": "the next action is sampled from the policy",
    "target_noise_clip": "the next action is sampled from the policy",
}
#: what other projects call an argument of ours (LeRobot, Diffusion Policy, ACT, Q-chunking)
OUR_NAMES = {
    "n_action_steps": "executed_steps",
    "action_horizon": "executed_steps",
    "chunk_size": "horizon",
    "action_chunk_size": "horizon",
    "horizon_length": "horizon",
    "pred_horizon": "horizon",
    "num_queries": "horizon",
    "n_obs_steps": "history",
    "obs_horizon": "history",
    "n_obs_history": "history",
}
# what a policy gives its networks' models, and an algorithm its policy
NOT_FROM_OUTSIDE = {"observation_space", "action_space", "lr_schedule", "event_shape", "action_dim", "cond_dim"}
POLICY_CLASSES = {
    "activation_fn": th.nn.Module,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}


def check_train_freq(name: str, value: Any) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :raises ValueError: if it is neither a positive number of steps nor such a number and a unit
    """
    number, unit = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, "step")
    if not isinstance(number, Integral) or isinstance(number, bool) or unit not in ("step", "episode", *TrainFrequencyUnit):
        raise ValueError(f"{name} must be a number of steps, or (n, 'step') or (n, 'episode'), got {value!r}.")
    check_range(name, number, 1)


def _check_action_noise(name: str, value: Any) -> None:
    check_type(name, value, ActionNoise, "an ActionNoise (like NormalActionNoise(mean, sigma))")


def _check_buffer_class(name: str, value: Any) -> None:
    check_class(name, value, ReplayBuffer, or_function=False)


class TrainingOptions(Options):
    """
    The arguments that all algorithms share. SB3's keep SAC's names, meaning and defaults.
    """

    policy_: str | type[BasePolicy] = option(
        alias="policy",
        kw_only=False,
        sb3=True,
        stored=False,
        doc='"MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class',
    )
    env_: GymEnv | str | None = option(
        alias="env",
        default=None,
        kw_only=False,
        sb3=True,
        stored=False,
        doc="environment or its id; None to train offline only",
    )
    learning_rate: float | Schedule = option(
        default=3e-4,
        kw_only=False,
        low=0,
        sb3=True,
        doc="learning rate of all networks, or a schedule of the progress remaining (from 1 to 0)",
        search=(1e-5, 1e-2, "log"),
    )
    buffer_size: int = option(default=1_000_000, low=1, sb3=True, size=False, doc="transitions that the replay buffer holds")
    learning_starts_: int = option(
        alias="learning_starts",
        default=100,
        check=lambda name, value: check_range(name, value, 0),
        sb3=True,
        size=False,
        doc="steps of random actions before the first gradient step; none after an offline phase",
    )
    batch_size: int = option(default=256, low=1, sb3=True, doc="transitions per gradient step")
    tau: float = option(
        default=0.005,
        low=0,
        high=1,
        sb3=True,
        doc="how far the target critics follow in one update",
        search=(0.001, 0.08, "log"),
    )
    gamma: float = option(default=0.99, low=0, high=1, sb3=True, doc="discount factor")
    train_freq_: int | tuple[int, str] = option(
        alias="train_freq",
        default=1,
        check=check_train_freq,
        sb3=True,
        doc='environment steps between two trainings, or (n, "episode")',
    )
    gradient_steps: int = option(
        default=1, low=-1, sb3=True, doc="gradient steps per training; -1 for as many as steps were taken in the environments"
    )
    action_noise: ActionNoise | None = option(
        default=None, check=_check_action_noise, sb3=True, doc="noise that is added to actions when collecting experience"
    )
    replay_buffer_class: type[ReplayBuffer] | None = option(
        default=None, check=_check_buffer_class, sb3=True, doc="replay buffer class; None for the one that fits"
    )
    replay_buffer_kwargs_: dict[str, Any] | None = option(
        alias="replay_buffer_kwargs", default=None, sb3=True, doc="its arguments"
    )
    optimize_memory_usage: bool = option(default=False, sb3=True, doc="store every observation once, not as a successor too")
    n_steps: int = option(default=1, low=1, sb3=True, doc="steps of the n-step return")
    target_update_interval: int = option(default=1, low=1, doc="gradient steps between two updates of the target critics")
    stats_window_size: int = option(
        default=100,
        low=1,
        sb3=True,
        attribute="_stats_window_size",
        doc="episodes that logged means of returns and lengths are taken over",
    )
    tensorboard_log: str | None = option(default=None, sb3=True, stored=False, doc="folder for TensorBoard's files")
    policy_kwargs_: dict[str, Any] | None = option(
        alias="policy_kwargs", default=None, sb3=True, doc="arguments of the policy"
    )
    verbose: int = option(default=0, sb3=True, doc="0 for no output, 1 for logs, 2 for debugging")
    seed: int | None = option(default=None, sb3=True, size=False, low=0, high=2**32 - 1, doc="seed of all random generators")
    device_: th.device | str = option(alias="device", default="auto", sb3=True, stored=False, doc="where networks live")
    actor_learning_rate: float | Schedule | None = option(
        default=None,
        low=0,
        doc="learning rate (or schedule) of the actor, and of a teacher beside it; None for ``learning_rate``, in offline "
        "runs of actor-critics for 3e-3",
        search=(1e-5, 1e-2, "log"),
    )
    cosine_lr_decay: bool | None = option(
        default=None,
        doc="multiply the learning rates by a cosine that falls to 0 over each run; None for offline runs only",
        search=[False, True],
    )
    max_grad_norm: float | None = option(
        default=None, above=0, doc="clip the gradient of every network to this norm", search=(0.5, 10.0, "log")
    )
    curriculum_steps: int | None = option(
        default=None,
        low=1,
        size=False,
        doc="gradient steps over which curricula (the number of noise levels) run; None for the length of the first offline "
        "phase; online without one, they stand at their end",
    )
    dataset: Any = option(
        default=None, stored=False, doc="data that ``learn()`` loads first, as :meth:`load_dataset` takes it"
    )
    dataset_kwargs: dict[str, Any] | None = option(
        default=None, stored=False, doc="further arguments of :meth:`load_dataset` for it"
    )
    pretrain_steps: int = option(
        default=0,
        low=0,
        size=False,
        doc="gradient steps on the dataset that ``learn()`` takes first, once; 0 for algorithms that learn offline only, "
        "whose ``learn()`` takes no others",
    )
    offline_fraction: float | Schedule | None = option(
        default=None,
        low=0,
        high=1,
        doc="share of every online batch drawn from the offline data: a number, or a schedule of the progress remaining (from "
        "1 to 0); None draws from both in proportion to their sizes",
    )
    keep_offline: bool = option(
        default=True,
        fixed=True,
        doc="keep the offline data in a buffer of its own; False for one buffer with SB3's overwriting",
    )
    normalize_observations: bool = option(
        default=True,
        fixed=True,
        doc="standardise observations inside the policy, with statistics of the offline data (without offline data there is "
        "none; use ``VecNormalize``)",
    )
    compile: bool = option(
        default=False,
        stored=False,
        doc="compile the losses, and the choice among candidates, with ``torch.compile``; the first gradient steps take tens "
        "of seconds longer, the first prediction that draws candidates some seconds",
    )
    precision: str = option(
        default="float32",
        one_of=PRECISIONS,
        doc='"float32", or "bf16" for large matrix products in bfloat16 while training (weights, optimizer, losses, targets '
        "and acting stay in float32)",
    )
    on_divergence: str = option(
        default="stop",
        one_of=ON_DIVERGENCE,
        doc='what to do when a loss or its gradient is not finite: "stop" (raise :class:`DivergenceError`) or "continue" '
        "(warn); the step is left out either way",
    )
    init_setup_model_: bool = option(
        alias="_init_setup_model", default=True, sb3=True, stored=False, doc="whether to build the networks at once"
    )

    def check_together(self) -> None:
        super().check_together()
        if self.n_steps > 1 and self.optimize_memory_usage:
            raise ValueError(
                "optimize_memory_usage can't be combined with n_steps > 1: SB3's NStepReplayBuffer has no such mode."
            )


def gradient_steps_online(n_timesteps: int, frequency: int, unit: str, gradient_steps: int, n_envs: int) -> int:
    """
    :param n_timesteps: environment steps, of all environments
    :param frequency: of ``train_freq``
    :param unit: of ``train_freq``, "step" or "episode"
    :param gradient_steps: per rollout; negative for as many as environment steps
    :param n_envs: number of environments
    :return: gradient steps that they bring; by the episode, whose length is not known, the most that can be
    """
    if gradient_steps < 0:
        return n_timesteps
    return n_timesteps * gradient_steps // (frequency * n_envs if unit == "step" else 1)


def explain_unknown(cls: type[Any], name: str) -> str:
    """
    :param cls: an algorithm
    :param name: an argument that its constructor does not have
    :return: end of a message: where it belongs, or what to use in place of SAC's and TD3's own
    """
    if name in NOT_OURS:
        return f": {NOT_OURS[name]}."
    if name in OUR_NAMES:
        return f": it is called {OUR_NAMES[name]} here."
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
    own: set[str],
    models: Mapping[str, type[Any]],
    new: bool,
) -> None:
    """
    :param cls: the algorithm
    :param policy_class: its policy; what one that is not this package's takes is not known
    :param given: ``policy_kwargs``
    :param own: what the algorithm passes to the policy and its models itself
    :param models: entry of ``policy_kwargs`` -> class of the model whose arguments it holds
    :param new: whether they are a new model's; in files of before, the policy's may lie among a model's
    :raises TypeError: if one is unknown, the algorithm's own or in the wrong dict, or no class where one is wanted
    """
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
