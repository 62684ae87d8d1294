"""The suites that train: which jobs they consist of, and running them in parallel, resumable processes."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from traceback import format_exc
from typing import Any, cast

from tqdm.auto import tqdm

from sb3_consistency.benchmark.records import Records
from sb3_consistency.benchmark.runs import Job, plain_options
from sb3_consistency.registry import find_algorithm

OFFLINE_ALGORITHMS = ("ConsistencyBC", "DiffusionBC", "ConsistencyAC", "CPQL", "DiffusionQL", "RACTD")
ONLINE_ALGORITHMS = ("SAC", "TD3", "ConsistencyAC", "CPQL", "DiffusionQL")
FINE_TUNED_ALGORITHMS = ("ConsistencyAC", "CPQL", "DiffusionQL")
DATASETS = ("mujoco/hopper/medium-v0", "mujoco/halfcheetah/medium-v0", "mujoco/walker2d/medium-v0")
ENVIRONMENTS = ("Pendulum-v1", "Hopper-v5")
DENOISING_STEPS = (1, 2, 5, 10, 20)
# the option that sets the number of network passes per action, in training and acting alike
STEPS_OPTION = {
    **dict.fromkeys(("ConsistencyBC", "ConsistencyAC", "CPQL", "RACTD"), "sampling_steps"),
    **dict.fromkeys(("DiffusionBC", "DiffusionQL"), "diffusion_steps"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "offline": {"algos": OFFLINE_ALGORITHMS, "data": DATASETS, "offline_steps": 100_000, "online_steps": 0},
    "online": {"algos": ONLINE_ALGORITHMS, "data": ENVIRONMENTS, "offline_steps": 0, "online_steps": 100_000},
    "offline-to-online": {
        "algos": FINE_TUNED_ALGORITHMS,
        "data": DATASETS,
        "offline_steps": 100_000,
        "online_steps": 50_000,
    },
    "denoising": {
        "algos": ("ConsistencyBC", "DiffusionBC"),
        "data": DATASETS[:1],
        "offline_steps": 50_000,
        "online_steps": 0,
    },
}


def jobs_of(
    suite: str,
    algos: Sequence[str],
    data: Sequence[str],
    seeds: Sequence[int],
    offline_steps: int,
    online_steps: int,
    options: str = "{}",
    episodes: int = 10,
    evaluations: int = 5,
) -> list[Job]:
    """
    :param suite: name of the suite
    :param algos: algorithms
    :param data: Minari datasets, or environments of the online suite
    :param seeds: seeds
    :param offline_steps: gradient steps on the dataset
    :param online_steps: environment steps
    :param options: constructor arguments of all algorithms, as the text of a dict
    :param episodes: episodes per evaluation
    :param evaluations: evaluations per phase
    :return: the jobs, all algorithms of one seed next to each other, so that an early stop leaves a comparison
    :raises ValueError: if ``options`` is no dict, or an algorithm is unknown or can't do what the suite asks for
    """
    taken = {"seed": "--seeds"} | (dict.fromkeys(STEPS_OPTION.values(), "the suite") if suite == "denoising" else {})
    given = plain_options(options, taken)
    algos = [_check_algorithm(algo, suite) for algo in algos]
    variants: dict[str, list[dict[str, Any]]] = {algo: [given] for algo in algos}
    if suite == "denoising":
        for algo in algos:
            name = STEPS_OPTION[algo]
            variants[algo] = [{**given, name: n} for n in DENOISING_STEPS]
    return [
        Job(suite, algo, repr(variant), place, seed, offline_steps, online_steps, episodes, evaluations)
        for seed in seeds
        for place in data
        for algo in algos
        for variant in variants[algo]
    ]


def _check_algorithm(name: str, suite: str) -> str:
    """The algorithm's class name, if the suite can run it: better now than after hours of other runs."""
    cls = find_algorithm(name)
    if suite != "online" and not hasattr(cls, "from_dataset"):
        raise ValueError(f"--algos: {name!r} does not learn from datasets, which the {suite} suite is about.")
    if suite in ("online", "offline-to-online") and getattr(cls, "offline_only", False):
        raise ValueError(f"--algos: {name!r} learns offline only; the {suite} suite collects experience.")
    if suite == "denoising" and cls.__name__ not in STEPS_OPTION:
        raise ValueError(f"--algos: the denoising suite knows the steps of {sorted(STEPS_OPTION)}, not of {name!r}.")
    return cls.__name__


def run_jobs(jobs: Iterable[Job], folder: Path, n_processes: int = 1) -> list[str]:
    """
    Run the jobs that have no record yet, each in a process of its own; the records are written as they come.

    With more than one process each takes one thread: PyTorch's threads wait for each other busily, and become
    hundreds of times slower when they outnumber the cores.

    :param jobs: the jobs; equal ones run once
    :param folder: folder of the benchmark run; ``failures.log`` there has the tracebacks of failed jobs
    :param n_processes: processes at a time
    :return: what went wrong, a line per failed job
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = Records(folder, "runs")
    done = records.read()

    def is_done(job: Job) -> bool:
        return job.has_files(folder) and any(asdict(job).items() <= record.items() for record in done)

    waiting = [job for job in dict.fromkeys(jobs) if not is_done(job)]
    n_jobs, threads = len(waiting), 1 if n_processes > 1 else None
    counter = get_context("spawn").Value("q", 0)
    running: dict[Connection, _Worker] = {}
    failures: list[str] = []
    with (
        tqdm(total=sum(job.steps for job in waiting), unit="step", smoothing=0) as bar,
        _threads_of_workers(threads),
    ):
        try:
            while waiting or running:
                while waiting and len(running) < n_processes:
                    worker = _Worker(waiting.pop(0), counter, threads, folder)
                    running[worker.results] = worker
                bar.set_description(f"{n_jobs - len(waiting) - len(running)} of {n_jobs} runs")
                for ready in wait(list(running), timeout=0.5):
                    worker = running.pop(cast(Connection, ready))
                    record, error, traceback = worker.outcome()
                    if record is not None:
                        records.append({**record, "processes": n_processes})
                    else:
                        failures.append(f"{worker.job.name}: {error}")
                        tqdm.write(f"failed: {failures[-1]}")
                        with (folder / "failures.log").open("a") as log:
                            log.write(f"{failures[-1]}\n{traceback}\n")
                bar.update(counter.value - bar.n)
        finally:
            # Ctrl-C: nobody would write down what they find
            for worker in running.values():
                worker.process.terminate()
    return failures


class _Worker:
    """A job in a process of its own, whose end, whatever it is, concerns no other job."""

    def __init__(self, job: Job, counter: "Synchronized[int]", threads: int | None, folder: Path) -> None:
        context = get_context("spawn")
        self.job = job
        self.results, results = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(results, job, counter, threads, folder))
        self.process.start()
        results.close()  # so that the process holds the only end, and its death is noticed

    def outcome(self) -> tuple[dict[str, Any] | None, str, str]:
        """The record, or what went wrong and where; waits for it."""
        outcome: tuple[dict[str, Any] | None, str, str] | None = None
        with suppress(EOFError):
            outcome = self.results.recv()
        self.process.join()
        died = f"its process died with exit code {self.process.exitcode} (-9: killed, by lack of memory perhaps)"
        return outcome or (None, died, "")


@contextmanager
def _threads_of_workers(threads: int | None) -> Iterator[None]:
    """Workers' own PyTorch reads the variable when it starts."""
    before = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        elif threads is not None:
            del os.environ["OMP_NUM_THREADS"]


def _work(results: Connection, job: Job, counter: "Synchronized[int]", threads: int | None, folder: Path) -> None:
    progress = _Progress(counter)
    try:
        results.send((job.run(progress, threads, folder), "", ""))
    except KeyboardInterrupt:
        pass  # the command itself says so
    except Exception as error:
        results.send((None, repr(error), format_exc()))
    finally:
        progress.flush()


class _Progress:
    """Adds to the shared counter now and then: taking its lock in every step would slow a step down."""

    def __init__(self, counter: "Synchronized[int]") -> None:
        self.counter, self.pending, self.last = counter, 0, time.monotonic()

    def __call__(self, n: int) -> None:
        self.pending += n
        if time.monotonic() - self.last > 0.5:
            self.flush()
            parent = parent_process()
            if parent is not None and not parent.is_alive():
                os._exit(1)  # nobody is left to write the record down

    def flush(self) -> None:
        with self.counter.get_lock():
            self.counter.value += self.pending
        self.pending, self.last = 0, time.monotonic()
