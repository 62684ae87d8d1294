"""Normalized scores in SB3's log, next to the mean reward that they are made of."""

from typing import Any

from stable_baselines3.common.logger import Logger


def normalized_score(mean_return: float, random_return: float, expert_return: float) -> float:
    """
    D4RL's normalized score: 0 for a random policy, 100 for an expert (100 times Minari's).

    :param mean_return: mean return of the policy
    :param random_return: reference return of a random policy
    :param expert_return: reference return of an expert
    :return: score
    """
    return 100 * (mean_return - random_return) / (expert_return - random_return)


class ScoreLogger(Logger):
    """
    The same log as ``base`` (shared outputs and pending values) that records ``eval/normalized_score`` whenever
    ``eval/mean_reward`` is recorded. SB3's EvalCallback records and writes in one go, so no callback could add it.

    :param base: the logger to extend
    :param random_return: reference return of a random policy
    :param expert_return: reference return of an expert
    """

    # slots: in the dict that is shared, one model's references would be those of all models with this log
    __slots__ = ("_references", "base")

    def __init__(self, base: Logger, random_return: float, expert_return: float) -> None:
        self.__dict__ = base.__dict__
        self.base = base
        self._references = (random_return, expert_return)

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        super().record(key, value, exclude)
        if key == "eval/mean_reward":
            super().record("eval/normalized_score", normalized_score(float(value), *self._references), exclude)


def with_scores(logger: Logger, references: tuple[float, float] | None) -> Logger:
    """
    :param logger: a model's log, perhaps one that records scores already
    :param references: reference returns of a random policy and of an expert; None for no scores
    :return: the log with scores of these references, or without
    """
    base = logger.base if isinstance(logger, ScoreLogger) else logger
    return base if references is None else ScoreLogger(base, *references)
