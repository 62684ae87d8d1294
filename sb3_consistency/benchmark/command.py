"""The ``benchmark`` command."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sb3_consistency.benchmark.jobs import AXES, Measurement, Work
from sb3_consistency.registry import how_to_install

MEASURING = ("speed", "scaling")
QUICK_STEPS = 500
QUICK_DATASET = "sb3-consistency/pendulum/mixed-v0"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """
    :param commands: sub-commands to add ``benchmark`` to
    """
    parser = commands.add_parser(
        "benchmark",
        help="compare algorithms: speed, denoising steps, offline, online, offline-to-online, planners",
        epilog="Every run writes a record of its own: the same command with the same --folder does what is missing.",
    )
    suites = parser.add_subparsers(required=True, metavar="SUITE", dest="suite")
    for name, text in {
        "speed": "gradient steps per second and acting latency, as ratios",
        "scaling": "step time against batch size, width, critics, steps and environments; memory of a large dataset",
    }.items():
        suite = suites.add_parser(name, help=text)
        suite.add_argument("--rounds", type=int, help="turns of every system per figure (default 15, quick 3)")
        suite.add_argument("--force", action="store_true", help="measure on a loaded machine, too")
    suites.choices["scaling"].add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="what to vary (default all)")
    for name, text in {
        "denoising": "score, training and acting time as the number of steps goes 1, 2, 5, 10, 20",
        "offline": "algorithms x datasets x seeds",
        "online": "algorithms x environments x seeds, from scratch, relative to SAC",
        "offline-to-online": "algorithms x datasets x seeds: gradient steps on the data, then environment steps",
    }.items():
        _add_training_arguments(suites.add_parser(name, help=text), name)
    planner = suites.add_parser("planner", help="RACTD: teacher and students by reward weight and number of passes")
    planner.add_argument("--datasets", dest="data", nargs="+", help="datasets")
    planner.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds (default 0)")
    planner.add_argument("--steps", nargs=3, type=int, metavar=("TEACHER", "REWARD", "STUDENT"), help="gradient steps")
    planner.add_argument("--students", nargs="+", metavar="DICT", help="constructor arguments of each student")
    planner.add_argument("--options", default="{}", help="constructor arguments of teachers and students, as a dict")
    planner.add_argument("--episodes", type=int, default=10, help="episodes per evaluation (default 10)")
    suites.add_parser("report", help="draw tables and plots again from the records in --folder")
    for name, suite in suites.choices.items():
        what = "records, tables and plots go here (default benchmark)"
        suite.add_argument("--folder", type=Path, default=Path("benchmark"), help=what)
        # shard_commands() looks for a flag by its name
        suite.allow_abbrev = False
        if name != "report":
            suite.add_argument("--quick", action="store_true", help="minutes on 2 cores, on data recorded here: a trial run")
            where = _add_executor_arguments(suite)
            if name in MEASURING:
                suite.set_defaults(jobs=None, shard=None, print_commands=None, threads=None, checkpoint_every=0)
            else:
                _add_run_arguments(suite, where)
    parser.set_defaults(run=run)


def _add_training_arguments(suite: argparse.ArgumentParser, name: str) -> None:
    suite.add_argument(
        "--algos",
        nargs="+",
        help="algorithms of this package, SB3 or sb3-contrib, of d3rlpy (offline: d3rlpy:IQL) or sbx (online: sbx:SAC), each "
        "with further constructor arguments or without: \"CPQL {'eta': 3.0}\" (default: all that the suite is for)",
    )
    what = "--envs" if name == "online" else "--datasets"
    suite.add_argument(what, dest="data", nargs="+", help="environment ids" if name == "online" else "datasets")
    suite.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds (default 0)")
    if name != "online":
        suite.add_argument("--steps", dest="offline_steps", type=int, help="gradient steps on the data")
    if name in ("online", "offline-to-online"):
        suite.add_argument("--online-steps", type=int, help="environment steps")
    what = "constructor arguments, as a dict (activation_fn by name), of all but other libraries' algorithms"
    suite.add_argument("--options", default="{}", help=what)
    suite.add_argument("--episodes", type=int, default=10, help="episodes per evaluation (default 10)")
    suite.add_argument("--evaluations", type=int, default=5, help="evaluations per phase (default 5)")


def _add_executor_arguments(suite: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    where = suite.add_argument_group("where the runs take place")
    where.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="default local: this machine")
    where.add_argument(
        "--executor-options",
        default="{}",
        metavar="DICT",
        help="slurm: what submitit takes, {'slurm_partition': 'cpu', 'timeout_min': 240}; ray: of a task, {'num_cpus': 2}",
    )
    where.add_argument("--address", help="ray: address of the cluster, or auto (default: one that is started here)")
    where.add_argument("--retries", type=int, default=0, help="how often a run whose process died is tried again (default 0)")
    return where


def _add_run_arguments(suite: argparse.ArgumentParser, where: "argparse._ArgumentGroup") -> None:
    where.add_argument("--jobs", type=int, help="runs at a time, one thread each if more than one (default 1; cluster: all)")
    shares = where.add_mutually_exclusive_group()
    shares.add_argument("--shard", metavar="I/N", help="do the I-th of N shares of the runs: for any other scheduler")
    shares.add_argument("--print-commands", type=int, metavar="N", help="print the commands of N shares, and stop")
    suite.add_argument("--threads", type=int, help="PyTorch threads of a run")
    suite.add_argument(
        "--checkpoint-every",
        type=int,
        default=10_000,
        metavar="STEPS",
        help="a killed run goes on from its last checkpoint, bit for bit (default 10000; 0: it starts anew)",
    )


def run(args: argparse.Namespace) -> None:
    """
    Run the ``benchmark`` command.

    :param args: its arguments
    :raises ImportError: if a library that draws or measures is missing
    :raises RuntimeError: if runs failed, or the machine is too loaded to measure speeds
    :raises ValueError: if an argument is out of its range
    """
    _check(args)
    if getattr(args, "print_commands", None):
        print("\n".join(shard_commands(args.arguments, args.print_commands)))
        return
    failures: list[str] = []
    if args.suite != "report":
        for jobs in _stages(args):
            failures += _run(jobs, args)
    from sb3_consistency.benchmark.report import write_report

    kinds = ("runs", "speed", "scaling")
    if args.suite == "report" or any((args.folder / f"{kind}{end}").exists() for kind in kinds for end in ("", ".jsonl")):
        print(f"Report: {write_report(args.folder).resolve()}")
    if failures:
        raise RuntimeError("Some runs failed; the same command runs them again.\n" + "\n".join(failures))


def _check(args: argparse.Namespace) -> None:
    at_least = {"jobs": 1, "episodes": 1, "evaluations": 1, "offline_steps": 1, "online_steps": 1, "rounds": 1, "threads": 1}
    for name, least in {**at_least, "print_commands": 1, "retries": 0, "checkpoint_every": 0}.items():
        number = getattr(args, name, None)
        if number is not None and number < least:
            option = "steps" if name == "offline_steps" else name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {least}, got {number}.")
    unused = {"local": ["address", "executor_options"], "slurm": ["address"]}.get(getattr(args, "executor", ""), [])
    if args.suite in MEASURING and args.executor == "local":
        unused.append("retries")
    for name in unused:
        if getattr(args, name) not in (None, "{}", 0):
            raise ValueError(f"--{name.replace('_', '-')} is for other executors than {args.executor}; leave it out.")
    needed = ["matplotlib", "pandas", "psutil", "scipy", "tabulate"]
    needed += ["onnxruntime", "onnxscript"] if args.suite == "speed" else []
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        raise ImportError(f"benchmark: {', '.join(absent)} missing: {how_to_install('benchmark')}.")


def shard_commands(arguments: Sequence[str], n: int) -> list[str]:
    """
    :param arguments: arguments of the command line
    :param n: number of shares
    :return: a command line for each
    """
    at = next(i for i, text in enumerate(arguments) if text.startswith("--print-commands"))
    # "--print-commands 16" or "--print-commands=16"
    rest = [*arguments[:at], *arguments[at + (1 if "=" in arguments[at] else 2) :]]
    program = [sys.executable, "-m", "sb3_consistency"]
    return [shlex.join([*program, *rest, "--shard", f"{i}/{n}"]) for i in range(1, n + 1)]


def _stages(args: argparse.Namespace) -> Any:
    """Lists of jobs of this share, each of which may need files of those before."""
    if args.suite in MEASURING:
        rounds, now = args.rounds or (3 if args.quick else 15), datetime.now(UTC).isoformat(timespec="seconds")
        yield _share([Measurement(args.suite, rounds, args.quick, args.force, now, tuple(getattr(args, "axes", AXES)))], args)
    elif args.suite == "planner":
        yield from _planner_stages(args)
    else:
        yield _share(_training_jobs(args), args)


def _share(jobs: Sequence[Any], args: argparse.Namespace) -> Sequence[Any]:
    from sb3_consistency.benchmark.executors import shard_of

    return shard_of(jobs, args.shard) if args.shard else jobs


def _run(jobs: Sequence[Any], args: argparse.Namespace) -> list[str]:
    from sb3_consistency.benchmark.executors import Settings, attempt, run_jobs
    from sb3_consistency.benchmark.runs import plain_options

    options = plain_options(args.executor_options, {}, "--executor-options")
    here = args.executor == "local"
    if here and args.suite in MEASURING:
        # no process around it, whose work would have to be told from others'
        outcomes = [attempt(job, Work(args.folder.resolve(), args.threads), {"executor": "local"}) for job in jobs]
        return [outcome.error for outcome in outcomes if outcome.error]
    n = args.jobs or (1 if here else 0)
    settings = Settings(args.executor, n, args.threads, args.checkpoint_every, args.retries, args.address, options)
    return run_jobs(jobs, args.folder, settings)


def _planner_stages(args: argparse.Namespace) -> Any:
    from sb3_consistency.benchmark.planner_suite import STUDENTS, planner_jobs
    from sb3_consistency.benchmark.suites import DATASETS

    data = args.data or ((QUICK_DATASET,) if args.quick else DATASETS)
    steps = args.steps or ((QUICK_STEPS, QUICK_STEPS, QUICK_STEPS) if args.quick else (100_000, 10_000, 100_000))
    teachers, students = planner_jobs(data, args.seeds, steps, args.students or STUDENTS, args.options, args.episodes)
    _record_quick_dataset(data)
    yield _share(teachers, args)
    # a share is one of all students, whichever teachers there are by now
    yield [job for job in _share(students, args) if job.teacher(args.folder).exists()]


def _training_jobs(args: argparse.Namespace) -> list[Any]:
    from sb3_consistency.benchmark.suites import DEFAULTS, jobs_of

    settings: dict[str, Any] = dict(DEFAULTS[args.suite])
    if args.suite == "online" and find_spec("sbx") is not None:
        settings["algos"] = (*settings["algos"], "sbx:SAC")
    if args.quick:
        settings["data"] = ("Pendulum-v1",) if args.suite == "online" else (QUICK_DATASET,)
        settings |= {k: QUICK_STEPS for k in ("offline_steps", "online_steps") if settings[k]}
    settings |= {k: getattr(args, k) for k in settings if getattr(args, k, None) is not None}
    more = {"seeds": args.seeds, "options": args.options, "episodes": args.episodes, "evaluations": args.evaluations}
    jobs = jobs_of(args.suite, **settings, **more)
    _record_quick_dataset(settings["data"])
    return list(jobs)


def _record_quick_dataset(data: Sequence[str]) -> None:
    """Record mixed-quality behaviour on Pendulum, once, where it is asked for: no download."""
    if QUICK_DATASET not in data:
        return
    from minari.storage.datasets_root_dir import get_dataset_path

    from sb3_consistency import record_dataset, swing_up

    if not (get_dataset_path(QUICK_DATASET) / "data").exists():
        controllers = [swing_up(noise, seed) for seed, noise in enumerate([0.5, 2.0, 4.0, 8.0])]
        record_dataset(QUICK_DATASET, "Pendulum-v1", controllers, 10_000, progress_bar=True)
