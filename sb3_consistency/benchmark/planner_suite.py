"""The planner suite: a teacher, and students distilled from it with and without rewards, at several numbers of passes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import RACTD, make_env, normalized_score, open_dataset
from sb3_consistency.benchmark.drawing import format_number, markdown, spread
from sb3_consistency.benchmark.jobs import Job, Work, in_order
from sb3_consistency.benchmark.load import OtherLoad
from sb3_consistency.benchmark.records import had_the_machine, provenance
from sb3_consistency.benchmark.runs import (
    acting_microseconds,
    constructor_arguments,
    continued,
    evaluate,
    merged,
    plain_options,
)
from sb3_consistency.data.safe_file import replacing

STUDENTS = ("{'reward_weight': 0.0}", "{}")
STUDENT_JUMPS = (1, 2, 4)
# beside the whole grid of the teacher; a Heun step takes two passes
FEW_HEUN_STEPS = 10
# calls of predict to time
N_CALLS = {"student": 200, "teacher": 20}
# records that agree in these, and in their options, are seeds of each other
SAME_RUN = ("data", "teacher_steps", "reward_steps", "offline_steps", "episodes")


@dataclass(frozen=True)
class PlannerJob(Job):
    """
    A teacher, or a student of the teacher of the job that is otherwise the same.

    :param student: options of the student, as the text of a dict; empty for the teacher
    :param teacher_steps: gradient steps of the teacher
    :param reward_steps: gradient steps of the student's reward model, part of its ``offline_steps``
    """

    student: str
    teacher_steps: int
    reward_steps: int

    @property
    def teacher_file(self) -> str:
        """Name of the file that the teacher is kept in."""
        return self._teacher_file(in_order(self.options))

    def _teacher_file(self, options: str) -> str:
        made_by = (self.data, options, self.seed, self.teacher_steps)
        return f"teacher_{sha256(repr(made_by).encode()).hexdigest()[:12]}.zip"

    def teacher(self, folder: Path) -> Path:
        """
        :param folder: folder of the benchmark run
        :return: file of the teacher; one of before the order of options did not count has them in its name as they were told
        """
        before = folder / self._teacher_file(self.options)
        return before if before.exists() else folder / self.teacher_file

    @property
    def name(self) -> str:
        return f"{super().name}, {f'student {self.student}' if self.student else 'teacher'}"

    @property
    def shard(self) -> str:
        return self.teacher_file

    def is_done(self, folder: Path, records: list[dict[str, Any]]) -> bool:
        return super().is_done(folder, records) and (bool(self.student) or self.teacher(folder).exists())

    def run(self, work: Work) -> dict[str, Any]:
        return execute_planner(self, work)


def planner_jobs(
    data: Sequence[str],
    seeds: Sequence[int],
    steps: tuple[int, int, int],
    students: Sequence[str] = STUDENTS,
    options: str = "{}",
    episodes: int = 10,
) -> tuple[list[PlannerJob], list[PlannerJob]]:
    """
    :param data: Minari datasets
    :param seeds: seeds
    :param steps: gradient steps of teacher, reward model and student
    :param students: constructor arguments of each student, as texts of dicts
    :param options: constructor arguments of all, as the text of a dict
    :param episodes: episodes per evaluation
    :return: the jobs of the teachers, which come first, and those of the students
    :raises ValueError: if a text is no dict, or sets what other arguments set, or a number of steps is below 1
    """
    if min(steps) < 1:
        raise ValueError(f"--steps must be at least 1 each, got {' '.join(map(str, steps))}.")
    teacher_steps, reward_steps, student_steps = steps
    options = _checked("--options", options)
    chosen = dict.fromkeys(_checked("--students", text) for text in students)
    places = [(seed, place) for seed in seeds for place in data]

    def job(seed: int, place: str, n_steps: int, student: str, n_reward: int) -> PlannerJob:
        return PlannerJob("planner", "RACTD", options, place, seed, n_steps, 0, episodes, 1, student, teacher_steps, n_reward)

    teachers = [job(*where, teacher_steps, "", 0) for where in places]
    n_steps = reward_steps + student_steps
    return teachers, [job(*where, n_steps, student, reward_steps) for where in places for student in chosen]


def _checked(name: str, text: str) -> str:
    """The text of the same dict, always written in the same way: equal options share a teacher."""
    taken = {"seed": "--seeds", "teacher": "the suite", "teacher_steps": "--steps", "reward_steps": "--steps"}
    return repr(plain_options(text, taken, name))


def execute_planner(job: PlannerJob, work: Work) -> dict[str, Any]:
    """
    Train a teacher and keep it, or a student of it, and let it act.

    :param job: what to run
    :param work: what it finds where it runs; teachers are kept in its folder
    :return: the record: the job, score and acting time for each number of passes, and versions
    """
    if work.threads is not None:
        th.set_num_threads(work.threads)
    versions, others = provenance(), OtherLoad()
    source = open_dataset(job.data)
    eval_env, env = (make_vec_env(lambda: make_env(source.make_env()), n_envs=n) for n in (job.episodes, 1))
    options = merged(constructor_arguments(job.options), constructor_arguments(job.student or "{}"))
    teacher = job.teacher(work.folder)
    trains = bool(job.student) or not teacher.exists()
    options |= {"reward_steps": job.reward_steps} if job.student else {"teacher_steps": job.teacher_steps}
    options |= {"teacher": str(teacher)} if teacher.exists() else {}
    model, checkpoints = continued(RACTD, job, work, env)

    def count(*_: Any) -> bool:
        work.report(1)
        return True

    callbacks = [ConvertCallback(count), *checkpoints]
    if model is not None:
        model.resume(callback=callbacks)
    else:
        model = RACTD.from_dataset(job.data, env=env, seed=job.seed, **options)
        if trains:
            model.pretrain(job.offline_steps, callback=callbacks)
    if trains and not job.student:
        with replacing(teacher) as unfinished:
            model.save(unfinished)
    network, passes_per_step = ("student", 1) if job.student else ("teacher", 2)
    planners = []
    for steps in STUDENT_JUMPS if job.student else (model.policy.teacher_model.model.n_levels - 1, FEW_HEUN_STEPS):
        with model.planning_with(network, steps):
            returns = {
                name: evaluate(model, eval_env, job, name == "deterministic").value for name in ("deterministic", "sampled")
            }
            planners.append(
                {"passes": passes_per_step * steps, **returns, "acting_us": acting_microseconds(model, N_CALLS[network])}
            )
    record = {**asdict(job), "behaviour": float(source.returns.mean()), "planners": planners}
    record["scored"] = bool(source.reference_returns)
    if source.reference_returns:
        for row in [record, *planners]:
            for name in {"behaviour", "deterministic", "sampled"} & row.keys():
                row[name] = round(normalized_score(row[name], *source.reference_returns), 2)
    return {**record, "other_load": others.processors(), "threads": th.get_num_threads(), **versions}


def planner_section(records: list[dict[str, Any]]) -> str:
    """
    :param records: records of the suite, one per job
    :return: Markdown: what each planner reaches with how many passes, mean and standard deviation over seeds
    """
    rows: list[dict[str, Any]] = []
    for group in dict.fromkeys(map(_same_run, records)):
        runs = [record for record in records if _same_run(record) == group]
        for i, planner in enumerate(runs[0]["planners"]):
            alone = [run["planners"][i]["acting_us"] for run in runs if had_the_machine(run)]
            rows.append(
                {
                    "data": runs[0]["data"],
                    "planner": _planner_name(runs[0]),
                    "passes": planner["passes"],
                    "score" if runs[0]["scored"] else "return": spread([run["planners"][i]["deterministic"] for run in runs]),
                    "sampled": spread([run["planners"][i]["sampled"] for run in runs]),
                    "behaviour": format_number(runs[0]["behaviour"]),
                    "seeds": len(runs),
                    "`predict`: us": f"{min(alone):.0f}" if alone else "",
                }
            )
    return markdown(rows)


def _same_run(record: dict[str, Any]) -> tuple[Any, ...]:
    return (in_order(record["options"]), in_order(record["student"]), *(record[name] for name in SAME_RUN))


def _planner_name(run: dict[str, Any]) -> str:
    common = "" if run["options"] == "{}" else f" `{run['options'][1:-1]}`"
    if not run["student"]:
        return f"teacher, {run['teacher_steps']} steps{common}"
    own = "" if run["student"] == "{}" else f" `{run['student'][1:-1]}`"
    return f"student{own}, {run['offline_steps'] - run['reward_steps']} steps{common}"
