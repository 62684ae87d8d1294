"""The model card that ``push-to-hub`` writes: our names, what was measured and how, and usage lines that work."""

import json
from collections.abc import Callable
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
from huggingface_sb3 import EnvironmentName

from sb3_consistency.registry import colour_of
from sb3_consistency.zoo.register import PRETRAIN_FOLDER, is_ours
from sb3_consistency.zoo.workarounds import around

CARD = """
# **{class_name}** agent for **{env_id}**
A **{class_name}** agent trained for **{env_id}** with [sb3_consistency](https://pypi.org/project/sb3-consistency/)
(one-step generative policies for [Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3)) and the
[RL Zoo](https://github.com/DLR-RM/rl-baselines3-zoo).

## Score
{score}
{pictures}
## Usage
```bash
pip install "sb3-consistency[zoo]"  # or in a checkout: pip install -e ".[zoo]"
# the zip file of the model is a pickle: fetch it only from whom you trust
export TRUST_REMOTE_CODE=True
python -m sb3_consistency load-from-hub --algo {algo} --env {env_id} -orga {organization}{repo_name} -f logs/
python -m sb3_consistency enjoy --algo {algo} --env {env_id} -f logs/
```

## Training
{training}
```bash
{command}
```

## Hyperparameters
```python
{hyperparams}
```
"""
ENV_KWARGS = """
## Environment arguments
```python
{env_kwargs}
```
"""


def use_our_card(module: Any) -> None:
    """
    Have models of this package described by our card; those of others keep rl-zoo3's.

    :param module: the module ``rl_zoo3.push_to_hub``
    """

    @around(module, "generate_model_card")
    def generate_model_card(
        original: Callable[..., tuple[str, dict[str, Any]]],
        algo_name: str,
        algo_class_name: str,
        organization: str,
        env_id: str,
        mean_reward: float,
        std_reward: float,
        hyperparams: dict[str, Any],
        env_kwargs: dict[str, Any],
    ) -> tuple[str, dict[str, Any]]:
        if not is_ours(algo_name):
            return original(algo_name, algo_class_name, organization, env_id, mean_reward, std_reward, hyperparams, env_kwargs)
        # rl-zoo3 finds a model again by the key that it derives from the name in the metadata
        metadata = module.generate_metadata(algo_name, env_id, mean_reward, std_reward)
        metadata["tags"] = [*metadata.get("tags", []), "sb3-consistency", algo_class_name]
        # the script's own variables: rl-zoo3 does not hand these on
        script = vars(module)
        name = str(script["repo_id"]).removeprefix(f"{organization}/")
        run, upload = Path(script["log_path"]), Path("hub") / name
        text = CARD.format(
            algo=algo_name,
            class_name=algo_class_name,
            env_id=env_id,
            organization=organization,
            repo_name=f" -name {name}" if name != str(script["model_name"]) else "",
            score=_score(mean_reward, std_reward, json.loads((upload / "results.json").read_text())),
            pictures=_pictures(run, upload, algo_class_name),
            training=_training(hyperparams),
            command=_command(run, algo_name, env_id, hyperparams),
            hyperparams=pformat(dict(hyperparams)),
        )
        return text + (ENV_KWARGS.format(env_kwargs=pformat(env_kwargs)) if env_kwargs else ""), metadata


def _score(mean: float, std: float, results: dict[str, Any]) -> str:
    """
    :param mean: mean return of the evaluation
    :param std: its standard deviation over the episodes
    :param results: what huggingface_sb3 saved of the evaluation
    :return: the mean with Student's 95 % interval
    """
    from scipy.stats import t

    episodes = results["n_eval_episodes"]
    half = t.ppf(0.975, episodes - 1) * std / np.sqrt(episodes - 1) if episodes > 1 else np.nan
    actions = "deterministic" if results["is_deterministic"] else "sampled"
    return (
        f"Mean return {mean:.2f}, 95 % interval [{mean - half:.2f}, {mean + half:.2f}], "
        f"over {episodes} episodes with {actions} actions. The returns have a standard deviation of {std:.2f}.\n"
        "The interval is that of this one model; other seeds of the training may score otherwise."
    )


def _pictures(run: Path, upload: Path, class_name: str) -> str:
    """
    :param run: the run's folder
    :param upload: the folder to be pushed
    :param class_name: of the algorithm
    :return: Markdown of the learning curve, which is drawn, and of the film, if there are any
    """
    lines = []
    if (upload / "replay.mp4").is_file():
        lines.append("[A film of it](replay.mp4)\n")
    # an offline phase before an online one has a folder of its own
    phases = {"offline": run / PRETRAIN_FOLDER / "evaluations.npz", "": run / "evaluations.npz"}
    curves = {name: np.load(path) for name, path in phases.items() if path.is_file()}
    if curves:
        _draw(curves, colour_of(class_name), upload / "learning_curve.png")
        lines.append("![Returns of the evaluations during training](learning_curve.png)\n")
    return "\n" + "\n".join(lines) if lines else ""


def _draw(curves: dict[str, Any], colour: str, path: Path) -> None:
    """
    :param curves: name of a phase -> what SB3's EvalCallback saved of it
    :param colour: of the algorithm
    :param path: picture to draw: the means, and the range of the episodes, with one panel per phase
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 + 3.2 * len(curves), 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axis, (name, saved) in zip(axes, curves.items(), strict=True):
        steps, returns = saved["timesteps"], saved["results"]
        axis.fill_between(steps, returns.min(axis=1), returns.max(axis=1), color=colour, alpha=0.2, linewidth=0)
        axis.plot(steps, returns.mean(axis=1), color=colour, linewidth=2, marker="o" if len(steps) < 2 else None)
        axis.set(xlabel="gradient steps on the data" if name == "offline" else "steps")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel=f"return: mean and range of {returns.shape[1]} episodes")
    figure.savefig(path, dpi=120)


def _training(hyperparams: dict[str, Any]) -> str:
    names, steps = _datasets(hyperparams), hyperparams.get("pretrain_steps")
    if not names:
        return "Trained online, without a dataset."
    text = f"Learned from the dataset{'s' * (len(names) > 1)} " + ", ".join(f"`{name}`" for name in names)
    text += f", {int(steps):,} gradient steps" if steps else ""
    kwargs = hyperparams.get("dataset_kwargs")
    return text + (f" (with {kwargs})." if kwargs else ".")


def _datasets(hyperparams: dict[str, Any]) -> list[str]:
    names = hyperparams.get("dataset") or []
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else [str(names)]


def _command(run: Path, algo: str, env_id: str, hyperparams: dict[str, Any]) -> str:
    """
    :param run: the run's folder, where the ``train`` command saved itself; a fetched model, or one of a script, has none
    :param algo: key of the algorithm
    :param env_id: id of the environment
    :param hyperparams: the run's
    :return: the command that trained the model, or one with the same data
    """
    saved = run / EnvironmentName(env_id) / "command.txt"
    command = saved.read_text().strip() if saved.is_file() else ""
    if command.startswith("python -m sb3_consistency "):
        return command
    names, steps = _datasets(hyperparams), hyperparams.get("pretrain_steps")
    what = f"--dataset {','.join(names)}" if names else f"--env {env_id}"
    length = f" --pretrain-steps {int(steps)}" if names and steps else ""
    return f"python -m sb3_consistency train --algo {algo} {what}{length}"
