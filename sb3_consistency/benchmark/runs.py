"""One training run of a benchmark: from a job to its record."""

import ast
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_consistency.benchmark.records import provenance
from sb3_consistency.benchmark.speed import OtherLoad, timed_calls
from sb3_consistency.data.episodes import make_known
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.envs.spaces import fitting_policy
from sb3_consistency.envs.wrappers import flatten_if_nested
from sb3_consistency.registry import find_algorithm
from sb3_consistency.resume.run_state import random_states, set_random_states
from sb3_consistency.training.scores import normalized_score

# evaluation environments start from these seeds, the same at every evaluation of every run with one seed
EVALUATION_SEED = 1000


@dataclass(frozen=True)
class Job:
    """
    What to train on what; equal jobs give equal records, so a finished one is not run again.

    :param suite: "offline", "online", "offline-to-online" or "denoising"
    :param algo: name of an algorithm of this package, SB3 or sb3-contrib
    :param options: its constructor arguments, as the text of a dict
    :param data: Minari dataset, or the environment's id where there is none
    :param seed: seed of the model; evaluations are seeded with it too
    :param offline_steps: gradient steps on the dataset
    :param online_steps: environment steps
    :param episodes: episodes per evaluation
    :param evaluations: evaluations per phase, evenly spread, the last at its end
    """

    suite: str
    algo: str
    options: str
    data: str
    seed: int
    offline_steps: int
    online_steps: int
    episodes: int
    evaluations: int

    @property
    def steps(self) -> int:
        return self.offline_steps + self.online_steps

    @property
    def name(self) -> str:
        return f"{self.algo}{'' if self.options == '{}' else ' ' + self.options} on {self.data}, seed {self.seed}"

    def has_files(self, folder: Path) -> bool:
        """Whether everything but the record that the job leaves for others is in the folder."""
        return True

    def run(self, report: Callable[[int], None], threads: int | None, folder: Path) -> dict[str, Any]:
        """
        :param report: told how many steps went by
        :param threads: PyTorch threads; None for all
        :param folder: where the job leaves its files, if any
        :return: the record
        """
        return execute(self, report, threads)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the global random states as they were: how often a run is evaluated must not change it."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


class Evaluation(BaseCallback):
    """
    Evaluate the deterministic policy at evenly spread steps.

    :param env: evaluation environments
    :param job: the job that runs
    :param phase: "offline" or "online"
    :param report: told how many steps went by
    """

    def __init__(self, env: VecEnv, job: Job, phase: str, report: Callable[[int], None]) -> None:
        super().__init__()
        self.env, self.job, self.phase, self.report = env, job, phase, report
        n_steps = job.offline_steps if phase == "offline" else job.online_steps
        self.due = [round(n_steps * i / job.evaluations) for i in range(1, job.evaluations + 1)]
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.start = 0

    def _on_training_start(self) -> None:
        self.start = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.report(self.training_env.num_envs if self.phase == "online" else 1)
        done = self.model.num_timesteps - self.start
        if self.due and done >= self.due[0]:
            del self.due[0]
            if not getattr(self.model, "can_act", True):
                return True
            began = time.perf_counter()
            value = mean_return(self.model, self.env, self.job, deterministic=True)
            self.points.append({"phase": self.phase, "step": done, "return": value})
            self.seconds += time.perf_counter() - began
        return True


def mean_return(model: Any, env: VecEnv, job: Job, deterministic: bool) -> float:
    """
    :param model: trained model
    :param env: evaluation environments
    :param job: the job that runs
    :param deterministic: whether to act deterministically
    :return: mean return over the job's episodes, from the same initial states every time
    """
    env.seed(EVALUATION_SEED + job.seed)
    with random_states_kept():
        th.manual_seed(EVALUATION_SEED + job.seed)
        returns = evaluate_policy(model, env, job.episodes, deterministic, return_episode_rewards=True)[0]
    return float(np.mean(returns))


def plain_options(text: str, taken: Mapping[str, str], name: str = "--options") -> dict[str, Any]:
    """
    :param text: a dict of plain values, as a user writes it
    :param taken: options that are given elsewhere -> where
    :param name: what the text is called in messages
    :return: the dict, of plain values still
    :raises ValueError: if the text is anything else, holds what is given elsewhere, or names no activation
    """
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{name} must be the text of a dict of plain values, got {text!r}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{name} must be the text of a dict of plain values, got {text!r}.")
    for option in taken.keys() & options.keys():
        raise ValueError(f"{name}: {option} is given by {taken[option]}, got {text!r}.")
    for activation in _activations(options):
        made = getattr(nn, str(activation), None)
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            raise ValueError(f"{name}: activation_fn must be the name of a class in torch.nn, 'SiLU' say, got {activation!r}.")
    return options


def constructor_arguments(text: str) -> dict[str, Any]:
    """
    :param text: a job's options: a dict of plain values, with an activation, which is a class, by its name in ``torch.nn``
    :return: the dict, as a constructor takes it
    """
    options: dict[str, Any] = ast.literal_eval(text)
    for activation in _activations(options):
        options["policy_kwargs"]["activation_fn"] = getattr(nn, activation)
    return options


def _activations(options: dict[str, Any]) -> list[Any]:
    policy_kwargs = options.get("policy_kwargs")
    return [policy_kwargs["activation_fn"]] if isinstance(policy_kwargs, dict) and "activation_fn" in policy_kwargs else []


def execute(job: Job, report: Callable[[int], None] = lambda n: None, threads: int | None = None) -> dict[str, Any]:
    """
    Train and evaluate.

    :param job: what to run
    :param report: told how many steps went by
    :param threads: PyTorch threads; None for all
    :return: the record: the job, final returns and scores, learning curve, times and versions
    """
    if threads is not None:
        th.set_num_threads(threads)
    # asked for before hours of training, in which the checkout may move on
    versions, others = provenance(), OtherLoad()
    options = constructor_arguments(job.options)
    cls = find_algorithm(job.algo)
    source = open_dataset(job.data) if job.offline_steps else None
    if source is None:
        make_known(job.data)

    def make_env() -> gym.Env:
        return flatten_if_nested(source.make_env() if source else gym.make(job.data))

    # as many environments as episodes: all states of a time step go through the network at once
    eval_env = make_vec_env(make_env, n_envs=job.episodes)
    if job.offline_steps:
        model: Any = cls.from_dataset(job.data, seed=job.seed, **options)
    else:
        env = make_vec_env(make_env, seed=job.seed)
        model = cls(fitting_policy(env.observation_space), env, seed=job.seed, **options)
    curve, seconds = [], {}
    for phase in [name for name, n in {"offline": job.offline_steps, "online": job.online_steps}.items() if n]:
        callback = Evaluation(eval_env, job, phase, report)
        began = time.perf_counter()
        if phase == "offline":
            model.pretrain(job.offline_steps, callback=callback)
        else:
            model.learn(job.online_steps, callback=callback)
        seconds[f"{phase}_seconds"] = round(time.perf_counter() - began - callback.seconds, 3)
        curve += callback.points
    record: dict[str, Any] = {**asdict(job), **seconds, "acting_us": acting_microseconds(model)}
    record["other_load"] = others.processors()
    record["behaviour_return"] = float(source.returns.mean()) if source else None
    for name, deterministic in {"deterministic": True, "sampled": False}.items():
        record[f"{name}_return"] = mean_return(model, eval_env, job, deterministic)
    if source and source.reference_returns:
        for name in ("deterministic", "sampled", "behaviour"):
            record[f"{name}_score"] = round(normalized_score(record[f"{name}_return"], *source.reference_returns), 2)
        for point in curve:
            point["score"] = round(normalized_score(point["return"], *source.reference_returns), 2)
    return {**record, "curve": curve, "threads": th.get_num_threads(), **versions}


def acting_microseconds(model: Any, n_calls: int = 200) -> float:
    """
    :param model: any SB3 model
    :param n_calls: calls to time
    :return: median time of ``model.predict`` for one observation, in microseconds
    """
    obs = model.observation_space.sample()
    with random_states_kept():
        seconds = timed_calls(model, lambda: model.predict(obs), n_calls)
    return round(1e6 * float(np.median(seconds)), 1)
