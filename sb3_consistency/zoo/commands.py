"""rl-zoo3's commands, run with our algorithms registered."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sb3_consistency.registry import how_to_install
from sb3_consistency.zoo import workarounds
from sb3_consistency.zoo.register import register

# name -> module of rl-zoo3, what it does
COMMANDS = {
    "train": ("rl_zoo3.train", "train online, on a dataset, or both"),
    "optimize": ("rl_zoo3.train", "tune hyperparameters (train -optimize)"),
    "enjoy": ("rl_zoo3.enjoy", "watch and score a trained model"),
    "record-video": ("rl_zoo3.record_video", "film a trained model"),
    "record-training": ("rl_zoo3.record_training", "film all checkpoints of a run"),
    "plot-train": ("rl_zoo3.plots.plot_train", "plot training returns"),
    "plot-from-file": ("rl_zoo3.plots.plot_from_file", "plot what all-plots gathered"),
    "all-plots": ("rl_zoo3.plots.all_plots", "compare evaluations of several runs"),
    "push-to-hub": ("rl_zoo3.push_to_hub", "share a trained model on the Hugging Face hub"),
    "load-from-hub": ("rl_zoo3.load_from_hub", "fetch a shared model"),
}


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """
    List the zoo's commands in the help; :func:`run` takes their arguments as they are.

    :param commands: sub-commands to add the zoo's to
    """
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=f"{text} [rl-zoo3]", add_help=False)


def run(command: str, argv: Sequence[str]) -> None:
    """
    Run a command of rl-zoo3.

    :param command: its name
    :param argv: its arguments
    :raises ImportError: if rl-zoo3, or what the command needs, is not installed
    """
    if command in ("record-video", "record-training", "push-to-hub"):
        workarounds.render_offscreen()
    register()
    module = _import(COMMANDS[command][0])
    _prepare(command, module)
    before = sys.argv, sys.orig_argv
    # rl-zoo3's functions parse sys.argv; what it saves as the command, and a model card shows, comes from sys.orig_argv
    sys.argv = [f"sb3-consistency {command}", *argv]
    sys.orig_argv = ["python", "-m", "sb3_consistency", command, *map(shlex.quote, argv)]
    try:
        if command in ("record-training", "push-to-hub"):
            with workarounds.ffmpeg_on_path():
                run_script(module)
        else:
            run_script(module)
    except ValueError as error:
        hint = _other_runs(str(error))
        if not hint:
            raise
        raise ValueError(f"{error}. {hint}") from error
    finally:
        sys.argv, sys.orig_argv = before


def _other_runs(message: str) -> str:
    """rl-zoo3 takes the newest run, though it may have failed: which others have a model?"""
    told = re.fullmatch(r"No model found for .+, path: (.+)", message)
    if not told:
        return ""
    path = Path(told[1])
    name, _, number = path.parent.name.rpartition("_")
    runs = [folder for folder in path.parent.parent.glob(f"{name}_*") if any(folder.glob("*.zip"))]
    numbers = sorted(int(folder.name.rpartition("_")[2]) for folder in runs if folder.name.rpartition("_")[2].isdigit())
    if not numbers:
        return f"No run in {path.parent.parent} has a model."
    return f"Run {number} saved none (did it fail?); with a model: --exp-id {' or '.join(map(str, numbers))}."


def _import(name: str) -> Any:
    # the package rl_zoo3.plots hides its modules behind functions of the same names
    try:
        if name == "rl_zoo3.push_to_hub":
            return workarounds.import_push_to_hub()
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} needs {error.name}: {how_to_install('zoo')}.") from error


def _prepare(command: str, module: Any) -> None:
    from sb3_consistency.zoo import hub, parsers, safe_files

    kinds: dict[str, type[argparse.ArgumentParser]] = {
        "train": parsers.TrainParser,
        "optimize": parsers.OptimizeParser,
        "enjoy": parsers.EnjoyParser,
        "record-video": parsers.RecordParser,
        "record-training": parsers.RecordParser,
        "plot-train": parsers.PlotParser,
        "plot-from-file": parsers.CompareParser,
    }
    parsers.use_parser(module, kinds.get(command, parsers.ZooParser))
    if hasattr(module, "create_test_env"):
        safe_files.read_our_statistics(module)
    if command == "record-training":
        workarounds.redirect_record_video(module)
    elif command == "push-to-hub":
        hub.use_our_card(module)
        safe_files.push_safe_files(module)
    elif command == "load-from-hub":
        safe_files.fetch_safe_files(module)


def run_script(module: Any) -> None:
    """
    Run what a module does as a script, in the imported module, where :func:`_prepare` has replaced names.

    Half of rl-zoo3's commands are no functions; ``python -m`` and ``runpy`` would run a fresh copy of the module.

    :param module: the imported module
    :raises RuntimeError: if it does nothing as a script
    """
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            exec(compile(ast.Module(node.body, []), module.__file__, "exec"), vars(module))
            return
    raise RuntimeError(f"{module.__name__} is no script in the installed rl-zoo3.")
