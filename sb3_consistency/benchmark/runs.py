"""One training run of a benchmark: from a job to its record."""

import ast
import hashlib
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_consistency import (
    CheckpointError,
    ResumableCheckpointCallback,
    fitting_policy,
    make_env,
    normalized_score,
    open_dataset,
)
from sb3_consistency.benchmark import peers
from sb3_consistency.benchmark.jobs import Job, Work
from sb3_consistency.benchmark.load import OtherLoad, timed_calls
from sb3_consistency.benchmark.records import provenance

# evaluation environments start from these seeds, the same at every evaluation of every run with one seed
EVALUATION_SEED = 1000


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the global random states as they were: how often a run is evaluated must not change it."""
    python, numpy = random.getstate(), np.random.get_state()
    with th.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Outcome(NamedTuple):
    """
    What the episodes of one evaluation came to.

    :param value: mean return
    :param success: share of successes; None where the environment tells of none
    """

    value: float
    success: float | None


def evaluate(model: Any, env: VecEnv, job: Job, deterministic: bool) -> Outcome:
    """
    :param model: whatever predicts as SB3's models do
    :param env: evaluation environments
    :param job: the job that runs
    :param deterministic: whether to act deterministically
    :return: mean return and successes of the job's episodes, from the same initial states every time
    """
    successes: list[float] = []

    def note(local: dict[str, Any], _: dict[str, Any]) -> None:
        # OGBench and Gymnasium-Robotics, Gymnasium's own and SB3's name
        told = local["info"].get("success", local["info"].get("is_success"))
        if local["done"] and told is not None:
            successes.append(float(told))

    env.seed(EVALUATION_SEED + job.seed)
    with random_states_kept():
        th.manual_seed(EVALUATION_SEED + job.seed)
        episodes = evaluate_policy(model, env, job.episodes, deterministic, callback=note, return_episode_rewards=True)[0]
    return Outcome(float(np.mean(episodes)), float(np.mean(successes)) if successes else None)


class RandomPolicy:
    """
    Acts uniformly at random, as SB3's models predict.

    :param env: environments
    :param seed: seed of its actions
    """

    def __init__(self, env: VecEnv, seed: int) -> None:
        self.n_envs, self.action_space = env.num_envs, env.action_space
        self.action_space.seed(seed)

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        """
        :return: an action for each environment, no state
        """
        return np.stack([self.action_space.sample() for _ in range(self.n_envs)]), None


class Evaluation(BaseCallback):
    """
    Evaluate the deterministic policy at evenly spread steps; :meth:`finish` does it for the last one, after training.

    SB3 calls callbacks before the gradient step of a time step: an evaluation there is not of the model that comes out.

    :param env: evaluation environments
    :param job: the job that runs
    :param report: told how many steps went by
    """

    def __init__(self, env: VecEnv, job: Job, report: Callable[[int], None] = lambda n: None) -> None:
        super().__init__()
        self.env, self.job, self.report = env, job, report
        self.phase, self.due = "offline", list[int]()
        self.seconds = self.cpu_seconds = 0.0
        # SB3's names: checkpoints carry what an evaluation callback has under them
        self.evaluations_timesteps: list[tuple[str, int]] = []
        self.evaluations_results: list[Outcome] = []

    def _on_training_start(self) -> None:
        # a continued run has those before its checkpoint
        self.begin(self.model.num_timesteps)

    def begin(self, done: int) -> None:
        """
        :param done: steps of the phase that were taken, and evaluated, before
        """
        n, times = self._n_steps(), self.job.evaluations
        self.due = [step for i in range(1, times) if (step := round(n * i / times)) > done]

    def _n_steps(self) -> int:
        return self.job.offline_steps if self.phase == "offline" else self.job.online_steps

    def _on_step(self) -> bool:
        self.after_step(self.model, self.model.num_timesteps)
        return True

    def after_step(self, model: Any, done: int) -> None:
        """
        :param model: whatever predicts
        :param done: steps of the phase by now
        """
        self.report(1)
        if self.due and done >= self.due[0]:
            del self.due[0]
            if getattr(model, "can_act", True):
                self._evaluate(model, done)

    def _evaluate(self, model: Any, step: int) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        self.evaluations_results.append(evaluate(model, self.env, self.job, deterministic=True))
        self.evaluations_timesteps.append((self.phase, step))
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu

    def finish(self, model: Any) -> Outcome:
        """
        :param model: the model at the end of the phase
        :return: the evaluation of it, which is the curve's last point
        """
        self._evaluate(model, self._n_steps())
        return self.evaluations_results[-1]

    def curve(self) -> list[dict[str, Any]]:
        """
        :return: the points so far
        """
        points = zip(self.evaluations_timesteps, self.evaluations_results, strict=True)
        return [
            {"phase": phase, "step": step, "return": value, **({} if success is None else {"success": success})}
            for (phase, step), (value, success) in points
        ]


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


def merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """
    :param common: options
    :param own: further ones, which have the last word
    :return: all of them, those within dicts, too
    """
    inner = {
        key: merged(common[key], own[key]) for key in own if isinstance(own[key], dict) and isinstance(common.get(key), dict)
    }
    return {**common, **own, **inner}


def _activations(options: dict[str, Any]) -> list[Any]:
    policy_kwargs = options.get("policy_kwargs")
    return [policy_kwargs["activation_fn"]] if isinstance(policy_kwargs, dict) and "activation_fn" in policy_kwargs else []


def execute(job: Job, work: Work) -> dict[str, Any]:
    """
    Train and evaluate.

    :param job: what to run
    :param work: what it finds where it runs
    :return: the record: the job, final returns and scores, learning curve, times and versions
    """
    if work.threads is not None:
        th.set_num_threads(work.threads)
    # asked for before hours of training, in which the checkout may move on
    versions, others = provenance(), OtherLoad()
    source = open_dataset(job.data) if job.offline_steps else None

    def new_env() -> gym.Env:
        return make_env(source.make_env() if source else job.data)

    # as many environments as episodes: all states of a time step go through the network at once
    eval_env = make_vec_env(new_env, n_envs=job.episodes)
    evaluation = Evaluation(eval_env, job, work.report)
    if job.algo.startswith("d3rlpy:"):
        assert source is not None
        model, times = peers.train_d3rlpy(job, source, evaluation)
    else:
        model, times = _train(job, work, make_vec_env(new_env, seed=job.seed), evaluation)
    record: dict[str, Any] = {**asdict(job), **times, "acting_us": acting_microseconds(model)}
    record["other_load"] = others.processors()
    outcomes = {"deterministic": evaluation.evaluations_results[-1], "sampled": evaluate(model, eval_env, job, False)}
    for name, outcome in outcomes.items():
        record[f"{name}_return"] = outcome.value
        if outcome.success is not None:
            record[f"{name}_success"] = outcome.success
    record["behaviour_return"] = float(source.returns.mean()) if source else None
    if source is None:
        record["random_return"] = evaluate(RandomPolicy(eval_env, job.seed), eval_env, job, False).value
    curve = evaluation.curve()
    if source and source.reference_returns:
        for name in ("deterministic", "sampled", "behaviour"):
            record[f"{name}_score"] = round(normalized_score(record[f"{name}_return"], *source.reference_returns), 2)
        for point in curve:
            point["score"] = round(normalized_score(point["return"], *source.reference_returns), 2)
    return {**record, "curve": curve, "weights": weights_digest(model), "threads": th.get_num_threads(), **versions}


def _train(job: Job, work: Work, env: VecEnv, evaluation: Evaluation) -> tuple[Any, dict[str, Any]]:
    """The trained model, and the times of its phases; continued from a checkpoint where there is one."""
    cls: Any = peers.find_algorithm(job.algo)
    options = constructor_arguments(job.options)
    model, checkpoints = continued(cls, job, work, env)
    callbacks = [evaluation, *checkpoints]
    times: dict[str, Any] = {} if model is None else {"resumed": True}
    if model is None and job.offline_steps:
        model = cls.from_dataset(job.data, env=env, seed=job.seed, **options)
    elif model is None:
        model = cls(fitting_policy(env.observation_space), env, seed=job.seed, **options)
    for phase, n_steps in {"offline": job.offline_steps, "online": job.online_steps}.items():
        interrupted = getattr(model, "interrupted_phase", None)
        if not n_steps or (phase, interrupted) == ("offline", "online"):
            continue
        evaluation.phase = phase
        began, cpu = time.perf_counter() - evaluation.seconds, time.process_time() - evaluation.cpu_seconds
        if interrupted is not None:
            model.resume(callback=callbacks)
        elif phase == "offline":
            model.pretrain(n_steps, callback=callbacks)
        else:
            model.learn(n_steps, callback=callbacks)
        times[f"{phase}_seconds"] = round(time.perf_counter() - began - evaluation.seconds, 3)
        times[f"{phase}_cpu_seconds"] = round(time.process_time() - cpu - evaluation.cpu_seconds, 3)
        evaluation.finish(model)
    return model, times


def continued(cls: Any, job: Job, work: Work, env: VecEnv) -> tuple[Any, list[BaseCallback]]:
    """
    :param cls: the job's algorithm
    :param job: the job that runs
    :param work: what it finds where it runs
    :param env: environment of the model
    :return: the model of the job's newest intact checkpoint, None if there is none; what writes further checkpoints
    """
    if not (work.checkpoint_every and hasattr(cls, "load_latest")):
        return None, []
    folder = work.folder / "checkpoints" / job.key
    callback = ResumableCheckpointCallback(folder, save_freq=work.checkpoint_every, keep=1)
    try:
        return (cls.load_latest(folder, env=env) if folder.is_dir() else None), [callback]
    except CheckpointError as error:
        warnings.warn(f"The job starts anew: {error}", stacklevel=2)
        return None, [callback]


def weights_digest(model: Any) -> str | None:
    """
    :param model: a trained model
    :return: digest of its policy's weights: equal digests are bit-equal weights; None where the library is not PyTorch's
    """
    if not hasattr(model.policy, "state_dict"):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(model.policy.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def acting_microseconds(model: Any, n_calls: int = 200) -> float:
    """
    :param model: any SB3 model
    :param n_calls: calls to time
    :return: median time of ``model.predict`` for one observation, in microseconds; where chunks are executed, of the mean over
        a chunk, whose first step alone costs a network pass
    """
    obs, state = model.observation_space.sample(), None

    def act() -> None:
        nonlocal state
        state = model.predict(obs, state)[1]

    per_chunk = min(getattr(model.policy, "steps_per_plan", 1), n_calls)
    with random_states_kept():
        seconds = timed_calls(model, act, n_calls - n_calls % per_chunk)
    return round(1e6 * float(np.median(np.reshape(seconds, (-1, per_chunk)).mean(axis=1))), 1)
