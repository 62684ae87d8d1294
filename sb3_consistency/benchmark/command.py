"""The ``benchmark`` command."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sb3_consistency.benchmark.records import Records

QUICK_STEPS = 500
QUICK_DATASET = "sb3-consistency/pendulum/mixed-v0"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """
    :param commands: sub-commands to add ``benchmark`` to
    """
    parser = commands.add_parser(
        "benchmark",
        help="compare algorithms: speed, denoising steps, offline, online, offline-to-online, planners",
        epilog="Interrupted training runs resume: call the same command with the same --folder.",
    )
    suites = parser.add_subparsers(required=True, metavar="SUITE", dest="suite")
    for name, text in {
        "speed": "gradient steps per second and acting latency, as ratios",
        "scaling": "step time against batch size, width, critics, steps and environments; memory of a large dataset",
    }.items():
        suite = suites.add_parser(name, help=text)
        suite.add_argument("--rounds", type=int, help="turns of every system per figure (default 15, quick 3)")
        suite.add_argument("--force", action="store_true", help="measure on a loaded machine, too")
    for name, text in {
        "denoising": "score, training and acting time as the number of steps goes 1, 2, 5, 10, 20",
        "offline": "algorithms x datasets x seeds",
        "online": "algorithms x environments x seeds, from scratch",
        "offline-to-online": "algorithms x datasets x seeds: gradient steps on the data, then environment steps",
    }.items():
        suite = suites.add_parser(name, help=text)
        suite.add_argument("--algos", nargs="+", help="algorithms (default: all that the suite is for)")
        what = "--envs" if name == "online" else "--datasets"
        suite.add_argument(what, dest="data", nargs="+", help="environment ids" if name == "online" else "Minari datasets")
        suite.add_argument("--seeds", nargs="+", type=int, default=[0])
        if name != "online":
            suite.add_argument("--steps", dest="offline_steps", type=int, help="gradient steps on the data")
        if name in ("online", "offline-to-online"):
            suite.add_argument("--online-steps", type=int, help="environment steps")
        suite.add_argument("--options", default="{}", help="constructor arguments, as a dict (activation_fn by name)")
        suite.add_argument("--episodes", type=int, default=10, help="episodes per evaluation")
        suite.add_argument("--evaluations", type=int, default=5, help="evaluations per phase")
        suite.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each if more than one")
    planner = suites.add_parser("planner", help="RACTD: teacher and students by reward weight and number of passes")
    planner.add_argument("--datasets", dest="data", nargs="+", help="Minari datasets")
    planner.add_argument("--seeds", nargs="+", type=int, default=[0])
    planner.add_argument("--steps", nargs=3, type=int, metavar=("TEACHER", "REWARD", "STUDENT"), help="gradient steps")
    planner.add_argument("--students", nargs="+", metavar="DICT", help="constructor arguments of each student")
    planner.add_argument("--options", default="{}", help="constructor arguments of teachers and students, as a dict")
    planner.add_argument("--episodes", type=int, default=10, help="episodes per evaluation")
    planner.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each if more than one")
    suites.add_parser("report", help="draw tables and plots again from the records in --folder")
    for name, suite in suites.choices.items():
        suite.add_argument("--folder", type=Path, default=Path("benchmark"), help="records, tables and plots go here")
        if name != "report":
            suite.add_argument("--quick", action="store_true", help="minutes on 2 cores, on data recorded here: a trial run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """
    Run the ``benchmark`` command.

    :param args: its arguments
    :raises ImportError: if a library that draws or measures is missing
    :raises RuntimeError: if runs failed, or the machine is too loaded to measure speeds
    """
    failures: list[str] = []
    for name in ("jobs", "episodes", "evaluations", "offline_steps", "online_steps", "rounds"):
        number = getattr(args, name, None)
        if number is not None and number < 1:
            option = "steps" if name == "offline_steps" else name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {number}.")
    try:
        import matplotlib  # noqa: F401
        import pandas  # noqa: F401
        import psutil  # noqa: F401
        import scipy  # noqa: F401
        import tabulate  # noqa: F401

        if args.suite == "speed":
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'benchmark: {error.name} is missing: pip install "sb3-consistency[benchmark]".') from error
    if args.suite in ("speed", "scaling"):
        from sb3_consistency.benchmark.scaling import measure_scaling
        from sb3_consistency.benchmark.speed import measure

        rounds = args.rounds or (3 if args.quick else 15)
        figures = measure if args.suite == "speed" else measure_scaling
        figures(Records(args.folder, args.suite), rounds, args.quick, args.force)
    elif args.suite == "planner":
        failures = _plan(args)
    elif args.suite != "report":
        failures = _train(args)
    from sb3_consistency.benchmark.report import write_report

    if list(args.folder.glob("*.jsonl")) or args.suite == "report":
        print(f"Report: {write_report(args.folder).resolve()}")
    if failures:
        raise RuntimeError("Some runs failed; the same command runs them again.\n" + "\n".join(failures))


def _plan(args: argparse.Namespace) -> list[str]:
    from sb3_consistency.benchmark.planner import STUDENTS, planner_jobs
    from sb3_consistency.benchmark.suites import DATASETS, run_jobs

    data = args.data or ((QUICK_DATASET,) if args.quick else DATASETS)
    steps = args.steps or ((QUICK_STEPS, QUICK_STEPS, QUICK_STEPS) if args.quick else (100_000, 10_000, 100_000))
    teachers, students = planner_jobs(data, args.seeds, steps, args.students or STUDENTS, args.options, args.episodes)
    _record_quick_dataset(data)
    failures = run_jobs(teachers, args.folder, args.jobs)
    taught = [job for job in students if (args.folder / job.teacher_file).exists()]
    return failures + run_jobs(taught, args.folder, args.jobs)


def _train(args: argparse.Namespace) -> list[str]:
    from sb3_consistency.benchmark.suites import DEFAULTS, jobs_of, run_jobs

    settings: dict[str, Any] = dict(DEFAULTS[args.suite])
    if args.quick:
        settings["data"] = ("Pendulum-v1",) if args.suite == "online" else (QUICK_DATASET,)
        settings |= {k: QUICK_STEPS for k in ("offline_steps", "online_steps") if settings[k]}
    settings |= {k: getattr(args, k) for k in settings if getattr(args, k, None) is not None}
    more = {"seeds": args.seeds, "options": args.options, "episodes": args.episodes, "evaluations": args.evaluations}
    jobs = jobs_of(args.suite, **settings, **more)
    _record_quick_dataset(settings["data"])
    return run_jobs(jobs, args.folder, args.jobs)


def _record_quick_dataset(data: Sequence[str]) -> None:
    """Record mixed-quality behaviour on Pendulum, once, where it is asked for: no download."""
    from minari.storage.datasets_root_dir import get_dataset_path

    from sb3_consistency.data.record import record_dataset, swing_up

    if QUICK_DATASET in data and not (get_dataset_path(QUICK_DATASET) / "data").exists():
        controllers = [swing_up(noise, seed) for seed, noise in enumerate([0.5, 2.0, 4.0, 8.0])]
        record_dataset(QUICK_DATASET, "Pendulum-v1", controllers, 10_000, progress_bar=True)
