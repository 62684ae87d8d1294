"""What runs come to: names, scores, interquartile means and their intervals."""

import ast
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sb3_consistency.benchmark.jobs import in_order

# how an evaluation acts
ACTINGS = ("deterministic", "sampled")
# evaluations at the end of a run of the online suite that make its final return
LAST = 3
N_RESAMPLES = 2000

Run = dict[str, Any]


class Estimate(NamedTuple):
    """A mean with its 95 % bootstrap interval, which is not a number where there is a single seed."""

    mean: float
    low: float
    high: float


#: by name and way to act
Aggregates = dict[str, dict[str, Estimate]]


def label(run: Run) -> str:
    """
    :param run: record of a run
    :return: its algorithm and options, in whatever order they were told: what tells it from others that are no seeds of it
    """
    options = in_order(run["options"])
    return str(run["algo"]) if options == "{}" else f"{run['algo']} {options}"


def labels(runs: Sequence[Run]) -> list[str]:
    """
    :param runs: records of runs
    :return: their labels, each once, in the order in which they come
    """
    return list(dict.fromkeys(map(label, runs)))


def of_label(runs: Sequence[Run], wanted: str) -> list[Run]:
    """
    :param runs: records of runs
    :param wanted: a label
    :return: the runs that have it
    """
    return [run for run in runs if label(run) == wanted]


def _flat(options: dict[str, Any], outer: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{outer}{key}.") if isinstance(value, dict) and value else {f"{outer}{key}": value}
    return flat


def _named_options(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The options of each run, those within others by their own keys, or from the outermost key on where two have the same."""
    each = [_flat(ast.literal_eval(run["options"])) for run in runs]
    keys = {name: name.rpartition(".")[2] for options in each for name in options}
    holders = Counter(keys.values())
    names = {name: key if holders[key] == 1 else name for name, key in keys.items()}
    return [{names[name]: value for name, value in options.items()} for options in each]


def _shared(runs: Sequence[Run]) -> dict[str, Any]:
    each = [options for run, options in zip(runs, _named_options(runs), strict=True) if ":" not in run["algo"]]
    return {key: value for key, value in each[0].items() if all((key, value) in o.items() for o in each)} if each else {}


def _text(key: str, value: Any) -> str:
    return key if value is True else f"{key}={value}"


def library_last(algo: str) -> str:
    """
    :param algo: name of an algorithm, like "CPQL" or "d3rlpy:IQL"
    :return: as figures and tables write it
    """
    library, _, name = algo.rpartition(":")
    return f"{name} ({library})" if library else name


def shared_options(runs: Sequence[Run]) -> str:
    """
    :param runs: records of runs
    :return: options that all runs of this package and SB3 have, as a person writes them
    """
    return ", ".join(_text(*item) for item in _shared(runs).items())


def display_names(runs: Sequence[Run]) -> dict[str, str]:
    """
    :param runs: records of runs
    :return: label -> name for people: the algorithm, and what is not the same for all
    """
    shared, names = _shared(runs), {}
    for run, options in zip(runs, _named_options(runs), strict=True):
        own = [_text(*item) for item in options.items() if item not in shared.items()]
        names[label(run)] = ", ".join([library_last(run["algo"]), *own])
    return names


def left_out_of_means(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """
    :param runs: records of one suite
    :param wanted: labels of those that the means are of
    :return: Markdown: a sentence that names the others; none where there are none
    """
    absent = [name for key, name in display_names(runs).items() if key not in wanted]
    return [f"Left out of the means, as they did not run on all of the data: {'; '.join(absent)}."] if absent else []


def score_of(run: Run, acting: str = "deterministic") -> float:
    """
    :param run: record of a run
    :param acting: "deterministic" or "sampled" actions
    :return: normalized score of these actions; where the data has no reference returns the share of successes in percent,
        or else the return
    """
    if f"{acting}_score" in run:
        return float(run[f"{acting}_score"])
    success = run.get(f"{acting}_success")
    return float(run[f"{acting}_return"] if success is None else 100 * success)


def point_of(point: dict[str, Any]) -> float:
    """
    :param point: point of a learning curve
    :return: as :func:`score_of`
    """
    return float(point.get("score", 100 * point["success"] if "success" in point else point["return"]))


def score_name(run: Run) -> str:
    """
    :param run: record of a run
    :return: what :func:`score_of` gives, as axes name it
    """
    if "deterministic_score" in run:
        return "normalized score"
    return "return" if run.get("deterministic_success") is None else "success, %"


#: what is shown -> the record's entry with the same of the data; of successes it tells nothing
BEHAVIOUR = {"normalized score": "behaviour_score", "return": "behaviour_return"}


def comparable(runs: Sequence[Run]) -> list[str]:
    """
    :param runs: records of one suite
    :return: labels of what can be compared by means over datasets: those that ran on all of the datasets; none where only
        one did or has several runs, where scores are of several kinds, or where there are returns, which have no mean over
        several tasks
    """
    places, kinds = {run["data"] for run in runs}, {score_name(run) for run in runs}
    if len(kinds) > 1 or (len(places) > 1 and "return" in kinds):
        return []
    names = [name for name in labels(runs) if common_seeds(of_label(runs, name), places)]
    return names if len(names) > 1 and sum(label(run) in names for run in runs) > len(names) else []


def common_seeds(runs: Sequence[Run], places: set[str]) -> set[int]:
    """
    :param runs: records of one algorithm
    :param places: datasets or environments
    :return: seeds that ran on all of them: with more seeds on some, these would count for more in a mean
    """
    return set.intersection(*({run["seed"] for run in runs if run["data"] == place} for place in places))


def grouped(runs: Sequence[Run], value: Callable[[Run], float], places: Sequence[str] | None = None) -> list[np.ndarray]:
    """
    :param runs: records of one algorithm
    :param value: what counts of a run
    :param places: datasets or environments; None for all
    :return: an array of values for each of them, of the seeds that ran on all
    """
    places = list(dict.fromkeys(run["data"] for run in runs)) if places is None else places
    seeds = common_seeds(runs, set(places))
    return [np.array([value(run) for run in runs if run["data"] == place and run["seed"] in seeds]) for place in places]


def interquartile_mean(*samples: Any, axis: int = -1) -> Any:
    """
    :param samples: one array of scores per dataset, resampled independently by the bootstrap
    :param axis: axis of the seeds
    :return: mean of the middle half of all scores (Agarwal et al. 2021); of fewer than four, of all
    """
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def estimate(groups: Sequence[np.ndarray], against: Sequence[np.ndarray] = ()) -> Estimate:
    """
    :param groups: an array of scores per dataset, a score per seed
    :param against: the same of what it is compared with, if it is a difference that is wanted
    :return: interquartile mean, or the difference of two, with an interval from resampling the seeds of every dataset
    """
    from scipy.stats import bootstrap

    def statistic(*samples: Any, axis: int = -1) -> Any:
        mean = interquartile_mean(*samples[: len(groups)], axis=axis)
        return mean - interquartile_mean(*samples[len(groups) :], axis=axis) if against else mean

    every = [*groups, *against]
    mean = float(statistic(*every))
    if min(map(len, every)) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    interval = bootstrap(every, statistic, n_resamples=N_RESAMPLES, method="percentile", random_state=0).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def aggregates(runs: Sequence[Run], wanted: Sequence[str]) -> Aggregates:
    """
    :param runs: records of one suite
    :param wanted: labels to compare
    :return: interquartile means of deterministic and of sampled actions, by the label
    """
    return {
        name: {acting: estimate(grouped(of_label(runs, name), partial(score_of, acting=acting))) for acting in ACTINGS}
        for name in wanted
    }


def _returns(run: Run) -> list[float]:
    return [point["return"] for point in run["curve"]]


def _means_in_a_row(returns: list[float]) -> np.ndarray:
    """Means of so many evaluations in a row as make a final return."""
    window = min(LAST, len(returns))
    return np.convolve(returns, np.ones(window), "valid") / window


def best_return(run: Run) -> float:
    """
    :param run: record of a run
    :return: highest mean return of so many evaluations in a row as make the final one
    """
    return float(_means_in_a_row(_returns(run)).max())


def final_return(run: Run) -> float:
    """
    :param run: record of a run
    :return: mean return of its last evaluations
    """
    return float(np.mean(_returns(run)[-LAST:]))


def area_under_curve(run: Run) -> float:
    """
    :param run: record of a run
    :return: mean return of all evaluations
    """
    return float(np.mean(_returns(run)))


def cpu_seconds_to(run: Run, wanted: float) -> float:
    """
    :param run: record of a run of the online suite
    :param wanted: a return
    :return: CPU time until the mean of the last few evaluations reaches it; twice the whole run's where it never does
    """
    returns = _returns(run)
    means = _means_in_a_row(returns)
    reached = np.flatnonzero(means >= wanted)
    share = run["curve"][reached[0] + len(returns) - len(means)]["step"] / run["online_steps"] if len(reached) else 2.0
    return float(share * run["online_cpu_seconds"])


class Reference(NamedTuple):
    """What returns of an environment are measured by: those of a random policy, and the mean final one of SAC."""

    random: float
    sac: float

    def score(self, value: float) -> float:
        """
        :param value: a return
        :return: 0 for the random policy, 1 for SAC
        """
        return (value - self.random) / (self.sac - self.random)


def label_of_sac(runs: Sequence[Run]) -> str | None:
    """
    :param runs: records of the online suite
    :return: the label of SB3's SAC that others are compared with: the one without options, or else the first
    """
    found = [key for key in labels(runs) if of_label(runs, key)[0]["algo"] == "SAC"]
    return min(found, key=lambda key: key != "SAC", default=None)


def references(runs: Sequence[Run]) -> dict[str, Reference]:
    """
    :param runs: records of the online suite
    :return: a reference for each environment where SAC learned something; that of others would turn scores round
    """
    found, sacs = {}, label_of_sac(runs)
    for place in dict.fromkeys(run["data"] for run in runs):
        here = [run for run in runs if run["data"] == place]
        random = [run["random_return"] for run in here if "random_return" in run]
        sac = [final_return(run) for run in here if label(run) == sacs]
        if random and sac and np.mean(sac) > np.mean(random):
            found[place] = Reference(float(np.mean(random)), float(np.mean(sac)))
    return found
