"""Where jobs run: processes of this machine, Slurm, or Ray. Whatever dies, the same command does what is missing."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from traceback import format_exc
from typing import Any, NamedTuple, cast

from tqdm.auto import tqdm

from sb3_consistency.benchmark.jobs import AnyJob, Work
from sb3_consistency.benchmark.records import Records
from sb3_consistency.registry import how_to_install

EXECUTORS = ("local", "slurm", "ray")
# submitit's own limit is 5 minutes; a job that is at its limit is queued again, and goes on from its checkpoint
TIMEOUT_MINUTES, TIMEOUTS = 24 * 60, 10


@dataclass(frozen=True)
class Settings:
    """
    Where and how jobs run.

    :param executor: one of :data:`EXECUTORS`
    :param processes: jobs at a time; on a cluster 0 for as many as it takes
    :param threads: PyTorch threads of a job; None for all where one job runs at a time on this machine, else 1
    :param checkpoint_every: steps between two checkpoints; 0 for none
    :param retries: how often a job whose process died is run again at once
    :param address: address of the Ray cluster; None for one that is started here
    :param options: options of submitit's executor (``partition``, ``timeout_min``, ``slurm_...``) or of Ray's tasks
        (``num_cpus``, ``resources``, ...); ``cluster`` is submitit's, "slurm" unless given
    """

    executor: str = "local"
    processes: int = 1
    threads: int | None = None
    checkpoint_every: int = 0
    retries: int = 0
    address: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Attempt(NamedTuple):
    """
    What a worker has to tell of a job.

    :param record: its record, if it has one
    :param error: else what went wrong, and where
    :param traceback: traceback of it
    :param died: whether the process ended, of itself or not, without a word
    """

    record: dict[str, Any] | None
    error: str = ""
    traceback: str = ""
    died: bool = False


def attempt(job: AnyJob, work: Work, facts: dict[str, Any]) -> Attempt:
    """
    What every worker does, wherever it is: run a job, and write its record.

    :param job: the job
    :param work: what it finds where it runs
    :param facts: what the record says of how it ran
    :return: the record, or what went wrong
    """
    try:
        record = {**job.run(work), **facts}
        Records(work.folder, job.kind).write(job.key, record)
    except Exception as error:
        where = f"on {socket.gethostname()}, in {Path.cwd()}"
        data = os.environ.get("MINARI_DATASETS_PATH")
        return Attempt(None, f"{error!r} ({where}{f', MINARI_DATASETS_PATH {data}' if data else ''})", format_exc())
    shutil.rmtree(work.folder / "checkpoints" / job.key, ignore_errors=True)
    return Attempt(record)


def missing(jobs: Iterable[AnyJob], folder: Path) -> list[AnyJob]:
    """
    :param jobs: jobs; equal ones count once
    :param folder: folder of the benchmark run
    :return: those without a record
    """
    found: dict[str, list[dict[str, Any]]] = {}
    jobs = list(dict.fromkeys(jobs))
    for kind in {job.kind for job in jobs}:
        found[kind] = Records(folder, kind).read()
    return [job for job in jobs if not job.is_done(folder, found[job.kind])]


def shard_of(jobs: Sequence[AnyJob], shard: str) -> list[AnyJob]:
    """
    :param jobs: all jobs of a command
    :param shard: "3/16" for the third of sixteen shares
    :return: the jobs of the share; those that need each other's files are in one
    :raises ValueError: if it is no such text
    """
    try:
        number, count = map(int, shard.split("/"))
    except ValueError:
        number = count = 0
    if not 1 <= number <= count:
        raise ValueError(f"--shard must be like 3/16, the third of sixteen, got {shard!r}.")
    groups = {group: i for i, group in enumerate(dict.fromkeys(job.shard for job in jobs))}
    return [job for job in jobs if groups[job.shard] % count == number - 1]


def run_jobs(jobs: Iterable[AnyJob], folder: Path, settings: Settings | None = None) -> list[str]:
    """
    Run the jobs that have no record yet; every one writes its own as soon as it is done.

    With more than one process each takes one thread: PyTorch's threads wait for each other busily, and become
    hundreds of times slower when they outnumber the cores.

    :param jobs: the jobs; equal ones run once
    :param folder: folder of the benchmark run; ``failures.log`` there has the tracebacks of failed jobs
    :param settings: where and how; by default one after the other, here
    :return: what went wrong, a line per failed job
    :raises ImportError: if the executor's library is missing
    """
    settings = settings or Settings()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    alone = settings.executor == "local" and settings.processes == 1
    work = Work(folder, settings.threads or (None if alone else 1), settings.checkpoint_every)
    facts = {"processes": settings.processes if settings.executor == "local" else 0, "executor": settings.executor}
    execute = {"local": _on_this_machine, "slurm": _on_slurm, "ray": _on_ray}[settings.executor]
    waiting, failures = missing(jobs, folder), dict[AnyJob, str]()
    # no terminal: a line now and then
    often = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=sum(job.steps for job in waiting), unit="step", smoothing=0, mininterval=often) as bar:
        for tries_left in range(settings.retries, -1, -1):
            died = []
            for job, outcome in execute(waiting, work, facts, settings, bar):
                failures.pop(job, None)
                if outcome.record is not None:
                    # where the folder is not shared, the worker wrote to one of its own
                    records = Records(folder, job.kind)
                    if not (records.folder / f"{job.key}.json").exists():
                        records.write(job.key, outcome.record)
                    continue
                failures[job] = f"{job.name}: {outcome.error}"
                tqdm.write(f"failed: {failures[job]}")
                with (folder / "failures.log").open("a") as log:
                    log.write(f"{failures[job]}\n{outcome.traceback}\n")
                if outcome.died and tries_left:
                    died.append(job)
            if not died:
                break
            waiting = died
    with suppress(OSError):  # those of failed jobs are kept
        (folder / "checkpoints").rmdir()
    return list(failures.values())


Attempts = Iterator[tuple[AnyJob, Attempt]]


def _on_slurm(jobs: list[AnyJob], work: Work, facts: dict[str, Any], settings: Settings, bar: Any) -> Attempts:
    try:
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError
    except ImportError as error:
        raise ImportError(f"--executor slurm needs {error.name}: {how_to_install('cluster')}.") from error
    options = {"name": "sb3-consistency", "timeout_min": TIMEOUT_MINUTES, "cpus_per_task": work.threads, **settings.options}
    cluster, timeouts = options.pop("cluster", "slurm"), options.pop("max_num_timeout", TIMEOUTS)
    executor = submitit.AutoExecutor(work.folder / "submitit", cluster=cluster, **{f"{cluster}_max_num_timeout": timeouts})
    if settings.processes and cluster == "slurm":
        options.setdefault("slurm_array_parallelism", settings.processes)
    executor.update_parameters(**options)
    waiting, running = list(jobs), dict[Any, AnyJob]()
    # Slurm has a queue, this machine has none
    at_a_time = len(jobs) if cluster == "slurm" else settings.processes or os.cpu_count() or 1
    try:
        while waiting or running:
            now = [waiting.pop(0) for _ in range(min(at_a_time - len(running), len(waiting)))]
            if now:
                submitted = executor.map_array(Requeued(), now, [work] * len(now), [facts] * len(now))
                running.update(zip(submitted, now, strict=True))
                bar.set_description(f"{len(waiting)} of {len(jobs)} runs wait for submission", refresh=False)
            for queued in [one for one in running if one.done()]:
                job = running.pop(queued)
                bar.update(job.steps)
                try:
                    yield job, queued.result()
                except (UncompletedJobError, FailedJobError) as error:
                    yield job, Attempt(None, f"job {queued.job_id} ended without a result: {error}", died=True)
            time.sleep(0.2 if cluster != "slurm" else 5)
    finally:
        for queued in running:  # Ctrl-C
            queued.cancel()


class Requeued:
    """What submitit runs: pre-empted or out of time, it is queued again, and goes on from the job's last checkpoint."""

    def __call__(self, job: AnyJob, work: Work, facts: dict[str, Any]) -> Attempt:
        return attempt(job, work, facts)

    def checkpoint(self, *arguments: Any) -> Any:
        """
        :param arguments: those of the call
        :return: the call that continues it
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def _on_ray(jobs: list[AnyJob], work: Work, facts: dict[str, Any], settings: Settings, bar: Any) -> Attempts:
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError(f"--executor ray needs {error.name}: {how_to_install('cluster')}.") from error
    if not ray.is_initialized():
        ray.init(address=settings.address, log_to_driver=False)
    # what died is run again by us, from its checkpoint
    options = {"num_cpus": work.threads, "max_retries": 0, **settings.options}
    remote = ray.remote(attempt).options(**options)
    waiting, running = list(jobs), dict[Any, AnyJob]()
    at_a_time = settings.processes or len(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop(0)
                running[remote.remote(job, work, facts)] = job
            bar.set_description(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs", refresh=False)
            for ready in ray.wait(list(running), timeout=1)[0]:
                job = running.pop(ready)
                bar.update(job.steps)
                try:
                    yield job, ray.get(ready)
                except RayError as error:  # of a worker or node that is no more; ours don't raise
                    yield job, Attempt(None, f"its worker died: {str(error).splitlines()[0]}", died=True)
    finally:
        for ready in running:
            ray.cancel(ready, force=True)


def _on_this_machine(jobs: list[AnyJob], work: Work, facts: dict[str, Any], settings: Settings, bar: Any) -> Attempts:
    counter = get_context("spawn").Value("q", 0)
    waiting, running = list(jobs), dict[Connection, _Worker]()
    shown = bar.n
    with _threads_of_workers(work.threads):
        try:
            while waiting or running:
                while waiting and len(running) < settings.processes:
                    worker = _Worker(waiting.pop(0), counter, work, facts)
                    running[worker.results] = worker
                bar.set_description(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs", refresh=False)
                for ready in wait(list(running), timeout=0.5):
                    worker = running.pop(cast(Connection, ready))
                    yield worker.job, worker.outcome()
                bar.update(shown + counter.value - bar.n)
        finally:
            # Ctrl-C: nobody would look at what they find
            for worker in running.values():
                worker.process.terminate()


class _Worker:
    """A job in a process of its own, whose end, whatever it is, concerns no other job."""

    def __init__(self, job: AnyJob, counter: "Synchronized[int]", work: Work, facts: dict[str, Any]) -> None:
        context = get_context("spawn")
        self.job = job
        self.results, results = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(results, job, counter, work, facts))
        self.process.start()
        results.close()  # so that the process holds the only end, and its death is noticed

    def outcome(self) -> Attempt:
        """What it has to tell; waits for it."""
        outcome: Attempt | None = None
        with suppress(EOFError):
            outcome = self.results.recv()
        self.process.join()
        died = f"its process died with exit code {self.process.exitcode} (-9: killed, by lack of memory perhaps)"
        return outcome or Attempt(None, died, died=True)


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


def _work(results: Connection, job: AnyJob, counter: "Synchronized[int]", work: Work, facts: dict[str, Any]) -> None:
    progress = _Progress(counter)
    try:
        results.send(attempt(job, replace(work, report=progress), facts))
    except KeyboardInterrupt:
        pass  # the command itself says so
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
                os._exit(1)  # the command is gone; its next call goes on from the checkpoint

    def flush(self) -> None:
        """Add what is pending."""
        with self.counter.get_lock():
            self.counter.value += self.pending
        self.pending, self.last = 0, time.monotonic()
