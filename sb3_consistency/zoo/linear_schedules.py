"""Schedules of the gradient step, for hyperparameters that are not functions of the progress."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearStepSchedule:
    """
    Falls from a value to 0 over the gradient steps of a run.

    :param initial_value: value at the first step
    :param steps: gradient steps until 0
    :param start: the first step
    """

    initial_value: float
    steps: int
    start: int = 0

    def __call__(self, step: int) -> float:
        return self.initial_value * max(0.0, 1.0 - max(0, step - self.start) / self.steps)


def parse_linear(name: str, value: str) -> tuple[float, bool]:
    """
    :param name: name of the hyperparameter, for the message
    :param value: "lin_0.5", or a number that YAML took for a string ("3e-4")
    :return: initial value, whether it falls linearly
    :raises ValueError: if it is neither
    """
    number = value.removeprefix("lin_")
    try:
        return float(number), number != value
    except ValueError:
        raise ValueError(f"{name}: expected a number or 'lin_<number>', got {value!r}.") from None
