"""The zoo's command lines, with our spellings and options: parsers that stand in for ``argparse.ArgumentParser``."""

import argparse
import importlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sb3_consistency.envs.wrappers import make_known
from sb3_consistency.resume.folder import latest_checkpoint
from sb3_consistency.zoo.datasets import dataset_environment, split_dataset
from sb3_consistency.zoo.register import canonical
from sb3_consistency.zoo.workarounds import has_display


def use_parser(module: Any, parser: type[argparse.ArgumentParser]) -> None:
    """
    rl-zoo3 builds its parsers inside functions: let it build ours.

    :param module: one of its modules
    :param parser: the class to build
    """
    if hasattr(module, "argparse"):
        module.argparse = SimpleNamespace(**{**vars(argparse), "ArgumentParser": parser})


class ZooParser(argparse.ArgumentParser):
    """Takes both spellings of our algorithms, and environments of Gymnasium-Robotics without ``--gym-packages``."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed = super().parse_args(args, namespace)
        self.settle(parsed)
        return parsed

    def settle(self, args: argparse.Namespace) -> None:
        """
        :param args: parsed arguments, to complete in place
        """
        if isinstance(getattr(args, "algo", None), str):
            args.algo = canonical(args.algo)
        if getattr(args, "algos", None):
            args.algos = [canonical(algo) for algo in args.algos]
        for package in getattr(args, "gym_packages", []):
            importlib.import_module(package)
        env = getattr(args, "env", None)
        if isinstance(env, str):
            make_known(getattr(env, "gym_id", env))


class TrainParser(ZooParser):
    """Adds the options of offline training."""

    optimize = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ours = self.add_argument_group("offline training (sb3_consistency)")
        ours.add_argument(
            "--dataset",
            help="dataset to train on first, or several, comma-separated: Minari ids, files or folders "
            "(docs/data.md); environment and hyperparameters are picked for it",
        )
        ours.add_argument("--pretrain-steps", type=int, help="overwrite the number of gradient steps on the dataset")
        ours.add_argument("--hyperparams-id", help="take the hyperparameters under this key of the file")
        tuning = self.add_argument_group("tuning (sb3_consistency)")
        tuning.add_argument(
            "--seeds-per-trial", type=int, default=1, help="train a trial with so many seeds; the study is told their mean"
        )
        tuning.add_argument(
            "--heartbeat",
            type=int,
            default=60,
            help="databases: seconds between the signs of life of a worker; its trial is tried again when three are missing",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        # rl-zoo3's is CartPole, which has no continuous actions
        self.set_defaults(env=None)
        if self.optimize:
            self.set_defaults(optimize_hyperparameters=True)
        return super().parse_args(args, namespace)

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        if os.path.isdir(args.trained_agent):
            # rl-zoo3 takes files only
            args.trained_agent = str(latest_checkpoint(args.trained_agent).file("model.zip"))
        if args.dataset is not None:
            args.dataset = split_dataset(args.dataset)
        self._check_tuning(args)
        if args.env is None:
            if args.dataset is None:
                self.error("--env or --dataset must say what to train on")
            args.env, env_kwargs = dataset_environment(args.dataset)
            args.env_kwargs = {**env_kwargs, **(args.env_kwargs or {})} or None

    def _check_tuning(self, args: argparse.Namespace) -> None:
        if args.seeds_per_trial < 1 or args.heartbeat < 1:
            name = "seeds-per-trial" if args.seeds_per_trial < 1 else "heartbeat"
            self.error(f"--{name} must be at least 1, got {getattr(args, name.replace('-', '_'))}")
        if args.optimize_hyperparameters:
            if args.n_jobs != 1 and args.seeds_per_trial > 1:
                self.error(
                    f"--n-jobs {args.n_jobs} and --seeds-per-trial {args.seeds_per_trial} do not go together: threads share "
                    "their random numbers. Start several workers with one --storage instead (docs/cluster.md)"
                )
            return
        if args.seeds_per_trial > 1:
            self.error("--seeds-per-trial is for tuning: optimize, or train -optimize")
        storage = args.storage is not None or args.study_name is not None
        if storage != (args.trial_id is not None) or (args.storage is None) != (args.study_name is None):
            self.error("to train with what tuning found, --storage, --study-name and --trial-id belong together")


class OptimizeParser(TrainParser):
    """``train -optimize``."""

    optimize = True


class EnjoyParser(ZooParser):
    """Does not render where no window can be opened: MuJoCo would abort the process."""

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        if not args.no_render and not has_display():
            print("No display: nothing is rendered (record-video writes a film instead).")
            args.no_render = True


class RecordParser(ZooParser):
    """Makes the output folder absolute: ffmpeg's list of films is relative to the folder it lies in."""

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        if getattr(args, "output_folder", None):
            args.output_folder = os.path.abspath(args.output_folder)


class PlotParser(ZooParser):
    """Adds ``--output``: the picture goes to a file, not to a window."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("-o", "--output", help="write the picture to this file instead of showing it")

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        if args.output:
            _save_next_figure(args.output)


def _save_next_figure(path: str) -> None:
    """The plotting functions end in ``plt.show()``: let the next call save the figure."""
    from matplotlib import pyplot as plt

    show = plt.show

    def save(*args: Any, **kwargs: Any) -> None:
        plt.show = show
        plt.savefig(path)

    plt.show = save


class CompareParser(ZooParser):
    """Of ``plot-from-file``: says what it can't draw before it fails on it."""

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        if args.input is None:
            self.error("--input must be given: the file that all-plots wrote (-o)")
        path = Path(args.input)
        path = path if path.suffix == ".pkl" else path.with_name(f"{path.name}.pkl")
        if not path.is_file():
            self.error(f"--input: there is no file {path}; all-plots writes one (-o)")
        results = pickle.loads(path.read_bytes())
        single = [
            f"{key} on {env}"
            for env, algos in results.items()
            if env != "results_table"
            for key, result in algos.items()
            if np.ndim(result.get("last_evals")) == 0
        ]
        if single:
            self.error(
                f"--input: {path} has the evaluations of one run, or none, for {', '.join(single)}; it takes two runs (seeds) "
                "or more of each to compare (all-plots gathers them), and plot-train draws single runs"
            )
