"""The stages of a planner's training: where each begins and ends, and a teacher taken from a file."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

STAGES = ("teacher", "reward", "student")
NETWORK_OF_STAGE = {"teacher": "teacher_model", "reward": "reward_model", "student": "student"}


def stage_ends(teacher_steps: int | float, reward_steps: int | float, run: int) -> tuple[int, int]:
    """
    :param teacher_steps: gradient steps of the teacher stage; a float is a share of the run
    :param reward_steps: of the reward stage, likewise
    :param run: gradient steps of the run
    :return: numbers of gradient steps at which the teacher and the reward stage end
    """
    # a share, however small, is at least one step
    steps = [max(1, round(n * run)) if isinstance(n, float) and n > 0 else int(n) for n in (teacher_steps, reward_steps)]
    return steps[0], steps[0] + steps[1]


def take_teacher(model: Any, path: str, same: Sequence[str]) -> None:
    """
    :param model: a planner that begins with a teacher that is trained already
    :param path: file of a saved model, whose teacher it is
    :param same: arguments that the teacher must have been trained with
    :raises ValueError: if the teacher does not fit
    """
    try:
        # the seed, because loading draws random numbers
        source = type(model).load(path, device=model.device, seed=model.seed, buffer_size=1)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"teacher: {error} Pass a file of {type(model).__name__}.save().") from error
    if source.teacher is None and source._n_updates == 0:
        raise ValueError(f"teacher: the model in {path} has taken no gradient step; train its teacher first.")
    for name in same:
        theirs, ours = getattr(source, name), getattr(model, name)
        if theirs != ours:
            raise ValueError(f"teacher: {path} was trained with {name}={theirs!r}, this model has {ours!r}.")
    prefixes = ("teacher_model.", "teacher_ema.")
    dicts = (source.policy.state_dict(), model.policy.state_dict())
    weights, own = ({key: w for key, w in d.items() if key.startswith(prefixes)} for d in dicts)
    differing = {(key, w.shape) for key, w in weights.items()} ^ {(key, w.shape) for key, w in own.items()}
    if differing:
        raise ValueError(
            f"teacher: the networks in {path} have other weights ({min(differing)[0]}, for one); use the same spaces, "
            "policy_kwargs and version of this package, or train a new teacher."
        )
    # weights of one shape may still be another function: noise levels, activations
    printed = (str(m.policy.teacher_model).splitlines() for m in (source, model))
    for theirs, ours in zip_longest(*printed, fillvalue=""):
        if theirs != ours:
            raise ValueError(
                f"teacher: {path} was trained with {theirs.strip()}, this model has {ours.strip()}; use the same "
                "policy_kwargs, or train a new teacher."
            )
    model.policy.load_state_dict(weights, strict=False)
    model.policy.share_normalizer()
