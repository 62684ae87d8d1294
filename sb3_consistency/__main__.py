"""The command line: ``python -m sb3_consistency COMMAND``, or ``sb3-consistency COMMAND``."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymnasium.error import Error as GymnasiumError

import sb3_consistency
from sb3_consistency.benchmark import command as benchmark
from sb3_consistency.data import convert, inspect
from sb3_consistency.data.checks import DatasetError
from sb3_consistency.zoo import commands as zoo
from sb3_consistency.zoo.register import PRETRAIN_FOLDER


def _add_model_arguments(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.add_argument("--algo", required=True, help=f"algorithm of the model: {examples}")
    parser.add_argument("--model", required=True, help="the .zip file that model.save() or rl-zoo3 wrote")
    parser.add_argument(
        "--vec-normalize",
        help="the file of save_vec_normalize() or VecNormalize.save() that belongs to the model, or none (default: the one "
        "that SB3's checkpoints or train wrote beside the model, if there is one)",
    )


def _load_model(args: argparse.Namespace, env: Any = None, **changes: Any) -> Any:
    from sb3_consistency.files.zip import read_model_file
    from sb3_consistency.registry import find_algorithm
    from sb3_consistency.training.algorithm import GenerativeAlgorithm

    cls = find_algorithm(args.algo)

    def load() -> Any:
        return cls.load(args.model, env=env, device="cpu", custom_objects={"buffer_size": 1, **changes})

    if issubclass(cls, GenerativeAlgorithm):
        return load()
    # SB3's raise anything for another algorithm's file
    return read_model_file(load, args.model, f"a file of {cls.__name__}.save()")


def find_vec_normalize(model: Path) -> Path | None:
    """
    The statistics that belong to a model, which its own file does not hold.

    :param model: file of a model
    :return: what SB3's CheckpointCallback or rl-zoo3 wrote beside it, rather a safe file than a pickle; None if there is none
    :raises ValueError: if rl-zoo3's notes say that the model was trained with statistics which are not there
    """
    step = re.fullmatch(r"(.+)_(\d+_steps)", model.stem)
    beside = [model.with_name(f"{step[1]}_vecnormalize_{step[2]}")] if step else []
    # rl-zoo3 keeps them, for all models of a run, in a folder named after the environment, where its notes are, too; an
    # offline phase before an online one has models and statistics of its own, but no notes
    run = model.parent.parent if model.parent.name == PRETRAIN_FOLDER else model.parent
    every_notes = sorted(run.glob("*/config.yml"))
    beside += [folder / "vecnormalize" for folder in (model.parent, *(model.parent / n.parent.name for n in every_notes))]
    found = [path for stem in beside for suffix in (".safetensors", ".pkl") if (path := Path(f"{stem}{suffix}")).is_file()]
    if found:
        return found[0]
    for notes in every_notes:
        if re.search(r"- normalize\n\s+- (?!false|null)", notes.read_text()):
            raise ValueError(
                f"--vec-normalize: {notes} says that {model} was trained on normalised observations, and there is no "
                "vecnormalize.safetensors or .pkl beside it: name the file, or none to go without."
            )
    return None


def _load_vec_normalize(args: argparse.Namespace, model: Any, env: Any) -> Any:
    """The statistics that the command line names or that lie beside the model, for an environment; None for none."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from sb3_consistency.data.safe_file import warn_of_pickle
    from sb3_consistency.data.safe_state import is_safe_path, load_vec_normalize

    if args.vec_normalize == "none":
        return None
    told = getattr(getattr(model, "run", None), "in_vec_normalize", None)  # of SB3's own models it is not known
    if told is False and model._n_updates > 0 and not args.vec_normalize:
        return None  # what lies there is another model's
    path = args.vec_normalize or find_vec_normalize(Path(args.model))
    if path is None and told:
        raise ValueError(
            f"--vec-normalize: {args.model} learned from observations that VecNormalize normalised, and its statistics are "
            "not beside it: name the file of save_vec_normalize() or VecNormalize.save(), or none to go without."
        )
    if path is None:
        return None
    if not args.vec_normalize:
        print(f"Observations are normalised with {path} (--vec-normalize none: they are not)")
    venv = DummyVecEnv([lambda: env])
    if is_safe_path(path):
        return load_vec_normalize(path, venv)
    warn_of_pickle(str(path), "save_vec_normalize(env, {})")
    try:
        return VecNormalize.load(str(path), venv)
    except (OSError, AssertionError):  # not there, or of other spaces
        raise
    except Exception as error:  # unpickling another file may raise anything
        raise ValueError(f"--vec-normalize: {path} is no file that VecNormalize.save() wrote: {error!r}.") from error


def add_record_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """
    :param commands: sub-commands to add ``record`` to
    """
    parser = commands.add_parser("record", help="record a trained model's behaviour as a Minari dataset")
    _add_model_arguments(parser, "cpql, sac, tqc, ...")
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--dataset-id", required=True, help="id of the new dataset, like mine/hopper/medium-v0")
    parser.add_argument("-n", "--n-steps", type=int, default=100_000, help="steps to record")
    parser.add_argument("--deterministic", action="store_true", help="act deterministically")
    parser.add_argument("--noise", type=float, default=0.0, help="deviation of added noise, as a share of half the range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a local dataset of this id")
    parser.set_defaults(run=record)


def record(args: argparse.Namespace) -> None:
    """
    Run the ``record`` command.

    :param args: its arguments
    """
    import gymnasium as gym

    from sb3_consistency import make_env, model_controller, record_dataset

    env = make_env(args.env)
    model = _load_model(args, env)
    vec_normalize = _load_vec_normalize(args, model, env)
    dataset = record_dataset(
        args.dataset_id,
        gym.make(args.env),
        model_controller(model, args.deterministic, args.noise, args.seed, vec_normalize),
        args.n_steps,
        seed=args.seed,
        algorithm_name=args.algo,
        description=f"{args.algo} model {args.model}, deterministic={args.deterministic}, noise={args.noise}",
        overwrite=args.overwrite,
        progress_bar=True,
    )
    print(f"Recorded {dataset.total_steps} steps, {dataset.total_episodes} episodes: {args.dataset_id}")


def add_export_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """
    :param commands: sub-commands to add ``export`` to
    """
    parser = commands.add_parser("export", help="write a trained policy as ONNX, torch.export or TorchScript")
    _add_model_arguments(parser, "cpql, consistency_ac, ...")
    parser.add_argument("--output", required=True, help="file to write: .onnx, .pt2 (torch.export) or .pt (TorchScript)")
    parser.add_argument("--noise-input", action="store_true", help="take noise as an input, instead of the fixed one")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> None:
    """
    Run the ``export`` command.

    :param args: its arguments
    """
    from sb3_consistency import SpacesOnlyEnv
    from sb3_consistency.files.export import export_policy

    # HER's buffer would ask for an environment
    model = _load_model(args, replay_buffer_class=None, replay_buffer_kwargs={})
    vec_normalize = _load_vec_normalize(args, model, SpacesOnlyEnv(model.observation_space, model.action_space))
    if vec_normalize is not None:
        # of however many it learned from: the statistics are the same
        model.n_envs = vec_normalize.num_envs
        model.set_env(vec_normalize)
    path = export_policy(model, args.output, not args.noise_input, normalized_input=args.vec_normalize == "none")
    print(f"Exported {path.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: arguments; those of the process when None
    :return: exit status
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="sb3-consistency", description=__doc__)
    parser.add_argument("--version", action="version", version=f"sb3-consistency {sb3_consistency.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_record_parser(commands)
    add_export_parser(commands)
    inspect.add_parser(commands)
    convert.add_parser(commands)
    benchmark.add_parser(commands)
    zoo.add_parsers(commands)
    # rl-zoo3 parses its own arguments
    in_zoo = bool(arguments) and arguments[0] in zoo.COMMANDS
    args = None if in_zoo else parser.parse_args(arguments)
    # a RuntimeError out of training needs its traceback, one of ours does not
    runtime_error = DatasetError if in_zoo else RuntimeError
    try:
        if args is None:
            zoo.run(arguments[0], arguments[1:])
        else:
            args.arguments = arguments
            args.run(args)
    except (ValueError, runtime_error, OSError, ImportError, AssertionError, GymnasiumError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
