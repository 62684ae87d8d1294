"""The speed suite: every system in one run, interleaved, so that ratios hold even where absolute figures drift."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from tqdm.auto import tqdm

from sb3_consistency import SpacesOnlyEnv, find_algorithm
from sb3_consistency.benchmark.load import check_load, timed_calls, wait_for
from sb3_consistency.benchmark.records import provenance

# Hopper's sizes
OBSERVATION_SIZE, ACTION_SIZE = 11, 3
WIDTHS = [256, 256, 256]
BATCH_SIZE = 256
N_TRANSITIONS = 10_000
ACTING_BATCHES = (1, 256)
# seconds of one turn of one system; long enough to make the clock and the caches not matter
TURN = 0.3
# calls that take seconds (hundreds of environments, 50 candidates, 100 steps) are done after so many, and so many seconds
FEWEST_SAMPLES, LONGEST = 3, 5.0


class System(NamedTuple):
    """
    Something to measure.

    :param label: name in the tables
    :param algo: algorithm
    :param options: its constructor arguments
    """

    label: str
    algo: str
    options: dict[str, Any]


def systems() -> list[System]:
    """
    :return: the systems of the suite
    """
    papers: dict[str, Any] = {"policy_kwargs": {"net_arch": WIDTHS, "layer_norm": False}}
    silu: dict[str, Any] = {"policy_kwargs": {**papers["policy_kwargs"], "activation_fn": nn.SiLU}}
    # what a gradient step may be made of, the slowest first
    variants: dict[str, dict[str, Any]] = {
        "": papers,
        ", SiLU": silu,
        ", compiled": {**papers, "compile": True},
        ", SiLU, compiled": {**silu, "compile": True},
        ", compiled, bf16": {**papers, "compile": True, "precision": "bf16"},
    }
    peers: dict[str, Any] = {"policy_kwargs": {"net_arch": WIDTHS}}
    return [
        System("SAC", "SAC", peers),
        System("TD3", "TD3", peers),
        System("ConsistencyBC", "ConsistencyBC", papers),
        System("DiffusionBC (T = 5)", "DiffusionBC", papers),
        *(System(f"{algo}{what}", algo, options) for algo in ("ConsistencyAC", "CPQL") for what, options in variants.items()),
        *(System(f"DiffusionQL (T = {n})", "DiffusionQL", {**papers, "diffusion_steps": n}) for n in (5, 50, 100)),
        *(System(f"DiffusionQL (T = 5){what}", "DiffusionQL", options) for what, options in variants.items() if what),
        System("RACTD, student stage", "RACTD", {"teacher_steps": 1, "reward_steps": 1}),
    ]


def build(system: System, device: str) -> Any:
    """
    :param system: what to build
    :param device: device to build it on
    :return: the model, with random transitions to learn from: ours is that of an offline phase
    """
    env = DummyVecEnv([_random_env])
    # SAC adds to its policy_kwargs
    given = deepcopy(system.options)
    options = {"buffer_size": N_TRANSITIONS, "batch_size": BATCH_SIZE, "seed": 0, "device": device, **given}
    cls, data = find_algorithm(system.algo), random_transitions()
    is_ours = hasattr(cls, "load_dataset")
    model = cls("MlpPolicy", env, **options, **({"dataset": data} if is_ours else {}))
    model.set_logger(Logger(None, []))
    if is_ours:
        # the first gradient step makes it the policy that it is on data
        return model.pretrain(1)
    for name in ("observations", "next_observations", "actions", "rewards"):
        array = getattr(model.replay_buffer, name)
        array[:] = data[name].reshape(array.shape)
    model.replay_buffer.full = True
    return model


def random_transitions() -> dict[str, np.ndarray]:
    """
    :return: :data:`N_TRANSITIONS` transitions of random numbers, in episodes of 1000 steps
    """
    rng = np.random.default_rng(0)
    path = rng.uniform(-1, 1, (N_TRANSITIONS + 1, OBSERVATION_SIZE)).astype(np.float32)
    return {
        "observations": path[:-1],
        "next_observations": path[1:],
        "actions": rng.uniform(-1, 1, (N_TRANSITIONS, ACTION_SIZE)).astype(np.float32),
        "rewards": rng.standard_normal(N_TRANSITIONS).astype(np.float32),
        "terminations": np.zeros(N_TRANSITIONS, bool),
        "truncations": np.arange(1, N_TRANSITIONS + 1) % 1000 == 0,
    }


def _random_env() -> gym.Env:
    return SpacesOnlyEnv(
        spaces.Box(-1, 1, (OBSERVATION_SIZE,), np.float32),
        spaces.Box(-1, 1, (ACTION_SIZE,), np.float32),
    )


def training_turn(model: Any, n_steps: int) -> float:
    """
    :param model: model to train
    :param n_steps: gradient steps
    :return: seconds per gradient step
    """
    wait_for(model)
    began = time.perf_counter()
    model.train(n_steps, model.batch_size)
    wait_for(model)
    return (time.perf_counter() - began) / n_steps


def acting_call(model: Any, batch: int, through: str) -> Callable[[], Any]:
    """
    :param model: model to act with
    :param batch: number of observations
    :param through: "predict" (SB3's whole path, arrays in and out) or "sampler" (tensors in and out)
    :return: one call
    """
    obs = np.random.default_rng(0).uniform(-1, 1, (batch, OBSERVATION_SIZE)).astype(np.float32)
    if through == "predict":
        single = obs[0] if batch == 1 else obs
        return lambda: model.predict(single)
    tensor = th.as_tensor(obs, device=model.device)
    model.policy.set_training_mode(False)

    def call() -> None:
        with th.no_grad():
            model.policy(tensor)

    return call


def exported_session(model: Any, path: Path) -> Any:
    """
    :param model: model with a generative actor
    :param path: file of its exported policy, written if it is not there: 100 passes take a minute to write
    :return: ONNX Runtime's session of the file, with as many threads as PyTorch has
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = th.get_num_threads()
    options.log_severity_level = 3
    if not path.exists():
        model.export(path, deterministic=False)
    return onnxruntime.InferenceSession(path, options)


def exported_call(session: Any, batch: int) -> Callable[[], Any]:
    """
    :param session: session of an exported policy
    :param batch: number of observations
    :return: one action from arrays to arrays; drawing the noise belongs to it
    """
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (batch, OBSERVATION_SIZE)).astype(np.float32)
    _, n_passes, action_size = session.get_inputs()[1].shape

    def call() -> None:
        noise = rng.standard_normal((batch, n_passes, action_size), np.float32)
        session.run(None, {"observation": obs, "noise": noise})

    return call


def exportable(model: Any) -> bool:
    """
    :param model: model that acts
    :return: whether it has a file to measure: one for the processor that no other system here has as well
    """
    return hasattr(model, "export") and not model.compile and model.device.type == "cpu"


def candidate_counts(model: Any) -> tuple[int | None, ...]:
    """
    :param model: model that acts
    :return: numbers of candidates to measure; None where there is no such option; empty where another system acts alike
    """
    if getattr(model, "precision", "float32") != "float32":
        return ()  # precision is of training alone
    if hasattr(model, "n_candidates"):
        return (50,) if model.compile else (1, 50)  # without candidates nothing is compiled
    return (None,)


def measure(rounds: int, quick: bool = False, force: bool = False) -> list[dict[str, Any]]:
    """
    Measure training and acting of every system, with one and with all threads, on the CPU and on CUDA if there is any.

    :param rounds: turns of every system per figure
    :param quick: shorter turns and the systems of up to 5 diffusion steps only
    :param force: measure on a loaded machine, too
    :return: the figures
    :raises RuntimeError: if the machine is loaded
    """
    load = check_load(force)
    chosen = [s for s in systems() if not quick or s.options.get("diffusion_steps", 5) <= 5]
    settings = [("cpu", n) for n in dict.fromkeys((1, th.get_num_threads()))]
    settings += [("cuda", 1)] if th.cuda.is_available() else []
    turn = TURN / 10 if quick else TURN
    before, run = th.get_num_threads(), datetime.now(UTC).isoformat(timespec="seconds")
    common = {"run": run, "load_percent": load, "rounds": rounds, **provenance()}
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for device, threads in settings:
                th.set_num_threads(threads)
                models = {system.label: build(system, device) for system in chosen}
                acting = _acting_figures(models, rounds, turn, Path(folder))
                setting = {"device": device, "threads": threads, **common}
                figures += [{**figure, **setting} for figure in [*_training_figures(models, rounds, turn), *acting]]
        finally:
            th.set_num_threads(before)
    return figures


def _training_figures(models: dict[str, Any], rounds: int, turn: float) -> Iterator[dict[str, Any]]:
    n_steps = {}
    for label, model in tqdm(models.items(), desc="warming up (compiling)", unit="system"):
        training_turn(model, 3)
        n_steps[label] = max(1, min(64, round(turn / training_turn(model, 1))))
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for _ in tqdm(range(rounds), desc="gradient steps", unit="round"):
        for label, model in models.items():
            seconds[label].append(training_turn(model, n_steps[label]))
    for label, values in seconds.items():
        yield {"system": label, "what": "gradient step", "batch": BATCH_SIZE, **summary(values)}


def _acting_figures(models: dict[str, Any], rounds: int, turn: float, folder: Path) -> Iterator[dict[str, Any]]:
    calls: dict[tuple[Any, ...], tuple[Any, int | None, Callable[[], Any]]] = {}
    for label, model in models.items():
        for through in ("predict", "sampler"):
            for batch in ACTING_BATCHES:
                for n_candidates in candidate_counts(model):
                    calls[label, through, batch, n_candidates] = (model, n_candidates, acting_call(model, batch, through))
    files = {label: model for label, model in models.items() if exportable(model)}
    for label, model in tqdm(files.items(), desc="exporting", unit="system"):
        session = exported_session(model, folder / f"{label}.onnx")
        for batch in ACTING_BATCHES:
            calls[label, "exported", batch, None] = (model, None, exported_call(session, batch))
    seconds: dict[tuple[Any, ...], list[float]] = {key: [] for key in calls}
    for round_number in tqdm(range(rounds + 1), desc="acting", unit="round"):
        for key, (model, n_candidates, call) in calls.items():
            if n_candidates is not None:
                model.n_candidates = n_candidates
            if len(seconds[key]) >= FEWEST_SAMPLES and sum(seconds[key]) > LONGEST:
                continue
            (once,) = timed_calls(model, call, 1)
            if round_number > 0:  # the first round warms up
                seconds[key] += timed_calls(model, call, max(1, min(100, round(turn / 4 / once))))
    for (label, through, batch, n_candidates), values in seconds.items():
        yield {"system": label, "what": through, "batch": batch, "candidates": n_candidates, **summary(values)}


def summary(seconds: list[float]) -> dict[str, float]:
    """
    :param seconds: times of one figure
    :return: their median and 95th percentile in microseconds, and their number
    """
    return {
        "median_us": 1e6 * statistics.median(seconds),
        "p95_us": 1e6 * float(np.percentile(seconds, 95)),
        "samples": len(seconds),
    }
