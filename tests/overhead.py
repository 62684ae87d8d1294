"""
What an executor costs: jobs that do nothing but import what all jobs need, one after the other.

``python -m tests.overhead --executors local submitit ray slurm --jobs 8`` prints seconds, and processor seconds of all
processes, of the first job and of each of the others. Jobs at a time share them; processor seconds say more on a busy machine.
"""

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil

from sb3_consistency.benchmark.executors import Settings, run_jobs
from sb3_consistency.benchmark.jobs import Work
from sb3_consistency.benchmark.load import busy, processor_seconds
from sb3_consistency.benchmark.records import Records
from tests import slurm

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Nothing:
    """A job that does nothing but import what all jobs need."""

    number: int

    kind = "nothing"
    steps = 1

    @property
    def name(self):
        return self.key

    @property
    def key(self):
        return f"nothing_{self.number}"

    def is_done(self, folder, records):
        return False

    def run(self, work: Work):
        import sb3_consistency.benchmark.runs  # noqa: F401

        return {"number": self.number, "processor_seconds": sum(psutil.Process().cpu_times()[:2])}


def measure(executor, n_jobs):
    """Seconds, and processor seconds of all processes, of the first job and of each of the others."""
    from tests.overhead import Nothing  # by the name that workers import it by

    figures = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = {"cluster": "local"} if executor == "submitit" else {}
        if executor == "slurm":
            stack.enter_context(mock.patch.dict(os.environ, stack.enter_context(slurm.cluster())))
        settings = Settings("slurm" if executor == "submitit" else executor, 1, 1, options=options)
        for numbers in (range(1), range(1, n_jobs)):
            began, processor = time.perf_counter(), processor_seconds()
            failures = run_jobs([Nothing(number) for number in numbers], folder, settings)
            assert failures == [], failures
            seconds, processor = time.perf_counter() - began, processor_seconds() - processor
            if executor == "slurm":  # whose workers are nobody's children
                records = [record for record in Records(folder, "nothing").read() if record["number"] in numbers]
                processor += sum(record["processor_seconds"] for record in records)
            figures += [seconds / len(numbers), processor / len(numbers)]
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executors", nargs="+", default=["local", "submitit", "ray", "slurm"])
    parser.add_argument("--jobs", type=int, default=8)
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    print(f"processors {busy():.0f} % busy before\n")
    print("| executor | first job: s | CPU s | each other: s | CPU s |\n|---|---|---|---|---|")
    for executor in args.executors:
        print(f"| {executor} | {' | '.join(f'{figure:.2f}' for figure in measure(executor, args.jobs))} |", flush=True)
