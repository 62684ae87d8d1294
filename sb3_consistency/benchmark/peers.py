"""Algorithms of other libraries, on the same data, environments and evaluations."""

from __future__ import annotations

import ast
import logging
import time
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

import sb3_consistency
from sb3_consistency.benchmark.control import LayerNormSAC
from sb3_consistency.registry import how_to_install

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from sb3_consistency.benchmark.jobs import Job
    from sb3_consistency.benchmark.runs import Evaluation

# prefix -> how to install it
LIBRARIES = {"d3rlpy": how_to_install("peers"), "sbx": "pip install sbx-rl"}


def find_algorithm(name: str) -> type[Any]:
    """
    :param name: name of an algorithm of this package, SB3 or sb3-contrib, "LayerNormSAC", "sbx:SAC" or "d3rlpy:IQL"
    :return: its class; of d3rlpy, that of its configuration
    :raises ImportError: if the library is missing
    :raises ValueError: if there is none of this name
    """
    library, _, algo = name.rpartition(":")
    if not library:
        return sb3_consistency.find_algorithm(algo, LayerNormSAC)
    if library not in LIBRARIES:
        raise ValueError(f"--algos: {library!r} in {name!r} is none of the libraries that can be asked: {sorted(LIBRARIES)}.")
    try:
        module = import_module("d3rlpy.algos" if library == "d3rlpy" else "sbx")
    except ImportError as error:
        raise ImportError(f"--algos: {name} needs {error.name}: {LIBRARIES[library]}.") from error
    ending = "Config" if library == "d3rlpy" else ""
    known = {key.removesuffix(ending).lower(): key for key in vars(module) if key[:1].isupper() and key.endswith(ending)}
    if algo.lower() not in known:
        raise ValueError(
            f"--algos: {library} has no {algo!r}, but {sorted(known[key].removesuffix(ending) for key in known)}."
        )
    cls: type[Any] = getattr(module, known[algo.lower()])
    return cls


def class_name(name: str) -> str:
    """
    :param name: as :func:`find_algorithm` takes it, in any case
    :return: as its library writes it
    :raises ImportError: if the library is missing
    :raises ValueError: if there is none of this name
    """
    library, colon, _ = name.rpartition(":")
    return library + colon + find_algorithm(name).__name__.removesuffix("Config" if library == "d3rlpy" else "")


class D3rlpyPolicy:
    """
    What d3rlpy learned, acting as SB3's models do.

    :param algo: the algorithm
    :param env: environments to act in
    """

    can_act, device = True, "cpu"

    def __init__(self, algo: Any, env: VecEnv) -> None:
        self.algo, self.observation_space, self.action_space = algo, env.observation_space, env.action_space
        self.policy = algo.impl.policy

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """
        :param observation: one or several observations
        :param state: not used
        :param episode_start: not used
        :param deterministic: whether to act deterministically
        :return: actions in the environment's units, no state
        """
        single = observation.ndim == len(self.observation_space.shape or ())
        batch = np.asarray(observation[None] if single else observation, np.float32)
        scaled = (self.algo.predict if deterministic else self.algo.sample_action)(batch)
        actions = _unscaled(np.clip(scaled, -1, 1), self.action_space)
        return (actions[0] if single else actions), None


def _scaled(actions: np.ndarray, source: Any, space: Any) -> np.ndarray:
    if not source.scaled_actions:
        actions = 2 * (actions - space.low) / (space.high - space.low) - 1
    return np.asarray(actions, np.float32)


def _unscaled(actions: np.ndarray, space: Any) -> np.ndarray:
    return np.asarray(space.low + (actions + 1) / 2 * (space.high - space.low), space.dtype)


def train_d3rlpy(job: Job, source: Any, evaluation: Evaluation) -> tuple[D3rlpyPolicy, dict[str, Any]]:
    """
    Train one of d3rlpy's algorithms on our episodes: its own reader of Minari data shifts those after the first.

    d3rlpy leaves out the last transition of an episode that a time limit cut.

    :param job: what to run
    :param source: the dataset
    :param evaluation: evaluates at the job's steps
    :return: the policy, and the times
    """
    import d3rlpy
    import structlog

    # it tells of every step that it takes
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    d3rlpy.seed(job.seed)
    space = evaluation.env.action_space
    episodes = [
        d3rlpy.dataset.Episode(
            observations=np.asarray(episode.observations, np.float32),
            actions=_scaled(episode.actions, source, space),
            rewards=np.asarray(episode.rewards, np.float32)[:, None],
            terminated=bool(episode.terminations[-1]),
        )
        for episode in source.episodes(range(len(source.lengths)))
    ]
    data = d3rlpy.dataset.create_infinite_replay_buffer(episodes)
    settings = {**reproduction_settings(job), **ast.literal_eval(job.options)}
    algo = find_algorithm(job.algo)(**settings).create(device=False)
    algo.build_with_dataset(data)
    policy = D3rlpyPolicy(algo, evaluation.env)
    evaluation.begin(0)
    began, cpu = time.perf_counter(), time.process_time()
    fit = {"n_steps_per_epoch": job.offline_steps, "save_interval": job.offline_steps + 1, "show_progress": False}
    quiet = d3rlpy.logging.NoopAdapterFactory()
    algo.fit(data, job.offline_steps, logger_adapter=quiet, callback=lambda *at: evaluation.after_step(policy, at[2]), **fit)
    times = {
        "offline_seconds": round(time.perf_counter() - began - evaluation.seconds, 3),
        "offline_cpu_seconds": round(time.process_time() - cpu - evaluation.cpu_seconds, 3),
    }
    evaluation.finish(policy)
    return policy, times


# (actor_beta, critic_beta) by kind of data, Tarasov et al. 2023, appendix; those of mixed quality are the "medium-replay" ones
REBRAC_PENALTIES = {
    "halfcheetah": {
        "random": (0.001, 0.1),
        "medium": (0.001, 0.01),
        "medium-replay": (0.01, 0.001),
        "medium-expert": (0.01, 0.1),
        "expert": (0.01, 0.01),
        "full-replay": (0.001, 0.1),
    },
    "hopper": {
        "random": (0.001, 0.01),
        "medium": (0.01, 0.001),
        "medium-replay": (0.05, 0.5),
        "medium-expert": (0.1, 0.01),
        "expert": (0.1, 0.001),
        "full-replay": (0.01, 0.01),
    },
    "walker2d": {
        "random": (0.01, 0.0),
        "medium": (0.05, 0.1),
        "medium-replay": (0.05, 0.01),
        "medium-expert": (0.01, 0.01),
        "expert": (0.01, 0.5),
        "full-replay": (0.01, 0.01),
    },
}


def rebrac_penalties(data: str) -> dict[str, float]:
    """
    :param data: name of a dataset: "mujoco/hopper/medium-v0", "d4rl:hopper-medium-replay-v2.hdf5"
    :return: the penalties that its authors use for data of this kind; 0.01 for both, with a warning, if there are none
    """
    name = data.lower().replace("mixed", "medium-replay").replace("_", "-")
    of_task: dict[str, tuple[float, float]] = next((levels for task, levels in REBRAC_PENALTIES.items() if task in name), {})
    # the longest name that fits: "medium" is in "medium-replay", too
    level = max((level for level in of_task if level in name), key=len, default=None)
    if level is None:
        warnings.warn(
            f"d3rlpy:ReBRAC: its authors published no penalties for data like {data!r}, 0.01 is taken for both; try some "
            "(--algos \"d3rlpy:ReBRAC {'actor_beta': 0.1, 'critic_beta': 0.01}\" ...), they matter.",
            stacklevel=2,
        )
    actor_beta, critic_beta = (0.01, 0.01) if level is None else of_task[level]
    return {"actor_beta": actor_beta, "critic_beta": critic_beta}


def reproduction_settings(job: Job) -> dict[str, Any]:
    """
    :param job: what to run
    :return: settings of the authors, as in d3rlpy's reproduction scripts, where they are not d3rlpy's defaults; data of
        mixed quality counts as "medium-replay"
    """
    from d3rlpy.models import VectorEncoderFactory
    from d3rlpy.optimizers import AdamFactory
    from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory
    from d3rlpy.preprocessing import ReturnBasedRewardScaler, StandardObservationScaler

    algo = job.algo.rpartition(":")[2]
    if algo == "TD3PlusBC":
        return {"observation_scaler": StandardObservationScaler()}
    if algo == "IQL":
        decay = AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=job.offline_steps))
        return {"reward_scaler": ReturnBasedRewardScaler(multiplier=1000.0), "actor_optim_factory": decay}
    if algo == "ReBRAC":
        return {
            "observation_scaler": StandardObservationScaler(),
            "actor_encoder_factory": VectorEncoderFactory([256, 256, 256]),
            "critic_encoder_factory": VectorEncoderFactory([256, 256, 256], use_layer_norm=True),
            # one's own take their places; where those are both there, nobody needs to be warned
            **({} if {"actor_beta", "critic_beta"} <= ast.literal_eval(job.options).keys() else rebrac_penalties(job.data)),
        }
    return {}
