"""The scaling suite: step time against every size, and the memory that a large dataset takes."""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from tqdm.auto import tqdm

from sb3_consistency import SpacesOnlyEnv, find_algorithm
from sb3_consistency.benchmark.jobs import AXES
from sb3_consistency.benchmark.load import check_load, processor_seconds, timed_calls
from sb3_consistency.benchmark.records import provenance
from sb3_consistency.benchmark.speed import System, acting_call, build, summary, training_turn

# HalfCheetah's sizes
MEMORY_SIZES = (17, 6)
EPISODE_LENGTH = 1000
DATASET = "sb3-consistency/random-v0"
# online, from several actors
ONLINE_ENV = "HalfCheetah-v5"
ENVIRONMENTS = (1, 2, 4, 8, 16)
# a gradient step per step of each environment, or per step of all
GRADIENT_STEPS = (-1, 1)
STEPS_PER_TURN = 5


class Point(NamedTuple):
    """
    One figure of the suite.

    :param axis: size that varies
    :param value: the size
    :param system: what to measure
    """

    axis: str
    value: int
    system: System


def system(algo: str, width: int = 256, policy_kwargs: dict[str, Any] | None = None, **options: Any) -> System:
    """
    :param algo: algorithm
    :param width: of its three layers
    :param policy_kwargs: further arguments of its policy
    :param options: its constructor arguments
    :return: the system
    """
    return System(algo, algo, {**options, "policy_kwargs": {"net_arch": [width] * 3, **(policy_kwargs or {})}})


def points(quick: bool = False) -> list[Point]:
    """
    :param quick: two sizes per axis only
    :return: what to measure, one size varied at a time
    """

    def sizes(*values: int) -> tuple[int, ...]:
        return values[:2] if quick else values

    peers = ("SAC", "CPQL", "DiffusionQL")
    return [
        *(Point("batch size", n, system(a, batch_size=n)) for a in peers for n in sizes(64, 128, 256, 512, 1024, 2048, 4096)),
        *(Point("width", n, system(a, width=n)) for a in peers for n in sizes(64, 128, 256, 512, 1024)),
        *(Point("critics", n, system(a, policy_kwargs={"n_critics": n})) for a in peers for n in sizes(1, 2, 5, 10)),
        *(Point("denoising steps", n, system("CPQL", sampling_steps=n)) for n in sizes(1, 2, 5, 10, 20)),
        *(Point("denoising steps", n, system("DiffusionQL", diffusion_steps=n)) for n in sizes(1, 2, 5, 10, 20)),
        *(Point("environments (predict)", n, system(a)) for a in peers for n in sizes(1, 4, 16, 64, 256)),
    ]


def measure_scaling(rounds: int, quick: bool = False, force: bool = False, axes: Sequence[str] = AXES) -> list[dict[str, Any]]:
    """
    Measure on one thread, so that the figures do not depend on the number of cores.

    :param rounds: measurements per figure
    :param quick: two sizes per axis, and a dataset of a tenth of the size
    :param force: measure on a loaded machine, too
    :param axes: what to measure
    :return: the figures
    :raises RuntimeError: if the machine is loaded
    """
    load = check_load(force)
    common = {"run": datetime.now(UTC).isoformat(timespec="seconds"), "load_percent": load, "threads": 1, **provenance()}
    before = th.get_num_threads()
    th.set_num_threads(1)
    figures: list[dict[str, Any]] = []
    try:
        for point in tqdm([p for p in points(quick) if p.axis in axes], desc="scaling", unit="figure"):
            figures.append({"axis": point.axis, "value": point.value, "system": point.system.label, **_time(point, rounds)})
        if "environments (online)" in axes:
            figures += online_figures(ENVIRONMENTS[:2] if quick else ENVIRONMENTS, rounds)
    finally:
        th.set_num_threads(before)
    if "memory" in axes:
        figures.append({"axis": "memory", **memory_figure(100_000 if quick else 1_000_000)})
    return [{**figure, **common} for figure in figures]


def _time(point: Point, rounds: int) -> dict[str, float]:
    model = build(point.system, "cpu")
    if point.axis.startswith("environments"):
        call = acting_call(model, point.value, "predict")
        timed_calls(model, call, 5)
        return summary(timed_calls(model, call, 20 * rounds))
    training_turn(model, 2)
    return summary([training_turn(model, 3) for _ in range(rounds)])


def online_figures(counts: tuple[int, ...], rounds: int) -> Iterator[dict[str, Any]]:
    """
    Learn online from environments in processes of their own, SAC and CPQL with their defaults in turn.

    :param counts: numbers of environments
    :param rounds: turns of every algorithm, of :data:`STEPS_PER_TURN` steps of all environments
    :return: the figures, per step of one environment; ``cpu_us`` is the processor time of all processes
    """
    for n in tqdm(counts, desc="online", unit="figure"):
        env = make_vec_env(ONLINE_ENV, n, seed=0, vec_env_cls=SubprocVecEnv)
        seconds: dict[tuple[int, str], list[float]] = {}
        processor: dict[tuple[int, str], list[float]] = {}
        models = {}
        for gradient_steps in GRADIENT_STEPS:
            options = {"learning_starts": 0, "gradient_steps": gradient_steps, "buffer_size": 100_000, "device": "cpu"}
            for name in ("SAC", "CPQL"):
                models[gradient_steps, name] = find_algorithm(name)("MlpPolicy", env, seed=0, **options)
        for turn in range(rounds + 1):
            for key, model in models.items():
                clock = _Clock(STEPS_PER_TURN)
                model.learn((STEPS_PER_TURN + 1) * n, callback=clock)
                if turn > 0:  # the first one warms up
                    seconds.setdefault(key, []).extend(np.diff(clock.seconds) / n)
                    processor.setdefault(key, []).append(clock.processor / (STEPS_PER_TURN * n))
        env.close()
        for (gradient_steps, label), values in seconds.items():
            # the processes' own clocks tick a hundred times a second: the mean of all turns
            figure = {**summary(values), "cpu_us": 1e6 * float(np.mean(processor[gradient_steps, label]))}
            yield {"axis": f"environments (online), gradient_steps={gradient_steps}", "value": n, "system": label, **figure}


class _Clock(BaseCallback):
    """Looks at the clock whenever all environments took a step, ``n_steps`` times from the first look on."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.n_steps, self.seconds, self.processor = n_steps, list[float](), 0.0

    def _on_step(self) -> bool:
        # looking at all processes takes time itself
        if not self.seconds:
            self.processor -= processor_seconds()
        self.seconds.append(time.perf_counter())
        if len(self.seconds) == self.n_steps + 1:
            self.processor += processor_seconds()
        return True


def memory_figure(n_transitions: int) -> dict[str, Any]:
    """
    Load a Minari dataset and train on it, in a process of its own.

    :param n_transitions: number of transitions
    :return: bytes of the replay buffer, peak of the bytes taken beyond those before loading, and seconds up to the end of the
        first gradient step
    """
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("MINARI_DATASETS_PATH")
        os.environ["MINARI_DATASETS_PATH"] = folder
        try:
            _write_dataset(n_transitions)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(_load_and_train, n_transitions).result()
        finally:
            del os.environ["MINARI_DATASETS_PATH"]
            if before is not None:
                os.environ["MINARI_DATASETS_PATH"] = before


def _write_dataset(n_transitions: int) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    env, rng = _random_env(), np.random.default_rng(0)
    ends = np.arange(1, EPISODE_LENGTH + 1) == EPISODE_LENGTH
    episodes = [
        EpisodeBuffer(
            observations=rng.standard_normal((EPISODE_LENGTH + 1, MEMORY_SIZES[0]), dtype=np.float32),
            actions=rng.uniform(-1, 1, (EPISODE_LENGTH, MEMORY_SIZES[1])).astype(np.float32),
            rewards=rng.standard_normal(EPISODE_LENGTH),
            terminations=np.zeros(EPISODE_LENGTH, bool),
            truncations=ends,
            infos={},
        )
        for _ in tqdm(range(n_transitions // EPISODE_LENGTH), desc="recording random transitions", unit="episode")
    ]
    spaces_of = {"observation_space": env.observation_space, "action_space": env.action_space}
    with warnings.catch_warnings():
        # of authors and the like, which data that is deleted again does not need
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(DATASET, episodes, **spaces_of, description="random numbers")


def _random_env() -> gym.Env:
    n_obs, n_actions = MEMORY_SIZES
    return SpacesOnlyEnv(spaces.Box(-np.inf, np.inf, (n_obs,), np.float32), spaces.Box(-1, 1, (n_actions,), np.float32))


def _load_and_train(n_transitions: int) -> dict[str, Any]:
    from sb3_consistency import CPQL

    # libraries take what they take, however large the data is
    small = CPQL("MlpPolicy", _random_env(), seed=0, device="cpu")
    small.load_dataset(DATASET, episodes=slice(0, 2))
    small.pretrain(200)
    model = CPQL("MlpPolicy", _random_env(), seed=0, device="cpu", buffer_size=n_transitions)
    _forget_peak()
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    model.load_dataset(DATASET)
    model.pretrain(1)
    seconds = time.perf_counter() - began
    model.pretrain(200)
    peak = _peak_bytes()
    buffer = model.replay_buffer
    assert buffer is not None
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    arrays = [array for name in names if isinstance(array := getattr(buffer, name, None), np.ndarray)]
    return {
        "value": n_transitions,
        "buffer_bytes": sum(array.nbytes for array in arrays),
        "extra_bytes": peak - before,
        "seconds": seconds,
    }


def _forget_peak() -> None:
    # Linux's; where it is missing or not ours to write, an earlier peak may count
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    # Linux's maxrss starts at the parent's peak
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))
