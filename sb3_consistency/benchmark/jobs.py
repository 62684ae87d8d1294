"""What a suite consists of: jobs, and what a worker is given to run one."""

import ast
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

#: what the scaling suite measures, unless told to measure less
AXES = ("batch size", "width", "critics", "denoising steps", "environments (predict)", "environments (online)", "memory")
# characters of a key before its digest: a file name has 255, and a machine's name, up to 64, and a process's number come to it
READABLE = 165


def tell_nobody(n: int) -> None:
    """
    :param n: steps that went by
    """


def in_order(text: str) -> str:
    """
    :param text: options, as the text of a dict; empty for none
    :return: the text of the same dict, its keys and those of dicts in it sorted: equal options have one, however they are told
    """

    def of(value: Any) -> Any:
        return {key: of(value[key]) for key in sorted(value, key=str)} if isinstance(value, dict) else value

    return repr(of(ast.literal_eval(text))) if text else ""


def _parsed(text: str) -> Any:
    return ast.literal_eval(text) if text else None


@dataclass(frozen=True)
class Work:
    """
    What a job finds where it runs.

    :param folder: folder of the benchmark run
    :param threads: PyTorch threads; None for all
    :param checkpoint_every: steps between two checkpoints, from which a killed job goes on; 0 for none
    :param report: told how many steps went by
    """

    folder: Path
    threads: int | None = None
    checkpoint_every: int = 0
    report: Callable[[int], None] = tell_nobody


@dataclass(frozen=True)
class Job:
    """
    What to train on what; equal jobs give equal records, so a finished one is not run again.

    :param suite: "offline", "online", "offline-to-online" or "denoising"
    :param algo: name of an algorithm of this package, SB3 or sb3-contrib, or of another library ("d3rlpy:IQL")
    :param options: its constructor arguments, as the text of a dict
    :param data: dataset, or the environment's id where there is none
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

    #: kind of the records, see :class:`~sb3_consistency.benchmark.records.Records`
    kind: ClassVar[str] = "runs"

    @property
    def steps(self) -> int:
        """How many steps :class:`Work` is told of."""
        return self.offline_steps + self.online_steps

    @property
    def name(self) -> str:
        """The job, for messages."""
        return f"{self.algo}{'' if self.options == '{}' else ' ' + self.options} on {self.data}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The job, for the names of its files: equal for equal jobs on all machines."""
        digest = sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{self.algo}_{self.data}_{self.seed}_")[:READABLE] + digest

    @property
    def shard(self) -> str:
        """Jobs that need each other's files agree in it."""
        return self.key

    def is_done(self, folder: Path, records: list[dict[str, Any]]) -> bool:
        """
        :param folder: folder of the benchmark run
        :param records: its records
        :return: whether one of them is the job's, and what else it leaves for others is there
        """
        mine = asdict(self)
        told = {name: _parsed(mine.pop(name)) for name in ("options", "student") if name in mine}
        alike = (record for record in records if mine.items() <= record.items())
        return any(all(_parsed(record.get(name, "")) == options for name, options in told.items()) for record in alike)

    def run(self, work: Work) -> dict[str, Any]:
        """
        :param work: what it finds where it runs
        :return: the record
        """
        from sb3_consistency.benchmark.runs import execute

        return execute(self, work)


@dataclass(frozen=True)
class Measurement:
    """
    A job of the speed or the scaling suite: measures on the machine that it runs on, every time anew.

    :param suite: "speed" or "scaling"
    :param rounds: measurements per figure
    :param quick: measure less
    :param force: measure on a loaded machine, too
    :param started: when it was asked for
    :param axes: what the scaling suite measures
    """

    suite: str
    rounds: int
    quick: bool
    force: bool
    started: str
    axes: tuple[str, ...] = AXES

    steps: ClassVar[int] = 1

    @property
    def kind(self) -> str:
        """Kind of the records."""
        return self.suite

    @property
    def name(self) -> str:
        """The job, for messages."""
        return f"{self.suite} suite"

    @property
    def key(self) -> str:
        """The job, for the names of its files."""
        return re.sub(r"[^0-9T]+", "", self.started)

    @property
    def shard(self) -> str:
        """One job, one shard."""
        return self.key

    def is_done(self, folder: Path, records: list[dict[str, Any]]) -> bool:
        """
        :param folder: folder of the benchmark run
        :param records: its records
        :return: False
        """
        return False

    def run(self, work: Work) -> dict[str, Any]:
        """
        :param work: what it finds where it runs
        :return: the record: figures
        """
        from sb3_consistency.benchmark.scaling import measure_scaling
        from sb3_consistency.benchmark.speed import measure

        how = (self.rounds, self.quick, self.force)
        return {"figures": measure(*how) if self.suite == "speed" else measure_scaling(*how, self.axes)}


#: whatever an executor runs
AnyJob = Job | Measurement
