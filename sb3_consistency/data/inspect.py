"""``python -m sb3_consistency inspect SOURCE``: what is in a dataset, before anything is trained on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from gymnasium import spaces

from sb3_consistency.data.episodes import Block, EpisodeSource
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.data.statistics import Moments
from sb3_consistency.envs.wrappers import flatten_nested
from sb3_consistency.registry import how_to_install

#: an action this near to a bound, as a share of half the range, is at it
AT_BOUND = 1e-3
#: so many values of every action are kept for the picture
KEPT_ACTIONS = 20_000


@dataclass
class Range:
    """Lowest and highest value, moments, and the number of entries that are not finite, of one array per step."""

    low: np.ndarray
    high: np.ndarray
    moments: Moments
    n_not_finite: int = 0

    @classmethod
    def like(cls, array: np.ndarray) -> Range:
        """
        :param array: first rows, (T, ...)
        :return: an empty one for rows of this shape
        """
        shape = array.shape[1:]
        return cls(np.full(shape, np.inf), np.full(shape, -np.inf), Moments(shape))

    def update(self, array: np.ndarray) -> None:
        """
        :param array: rows, (T, ...)
        """
        values = array.astype(np.float64)
        finite = np.isfinite(values)
        if not finite.all():
            self.n_not_finite += int((~finite).sum())
            values = np.where(finite, values, 0.0)
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        self.moments.update(values)


@dataclass
class Summary:
    """What one pass over a dataset finds. Episodes are counted in E, steps in N, actions have A entries."""

    source: EpisodeSource
    observations: dict[str, Range] = field(default_factory=dict)
    actions: Range | None = None
    n_terminated: int = 0
    n_truncated: int = 0
    at_bound: np.ndarray | None = None
    kept_actions: list[np.ndarray] = field(default_factory=list)
    rewards: Range | None = None

    def lines(self) -> Iterator[str]:
        """
        :return: what there is to say, line by line
        """
        source = self.source
        lengths, n_steps = source.lengths, int(source.lengths.sum())
        yield source.name
        yield f"episodes            {len(lengths):,}"
        yield f"steps               {n_steps:,}"
        yield f"episode lengths     {_quantiles(lengths)}"
        yield f"returns             {_quantiles(source.returns) if source.has_rewards else 'no rewards'}"
        if source.has_rewards and source.reference_returns is not None:
            low, high = source.reference_returns
            score = 100 * (float(source.returns.mean()) - low) / (high - low)
            yield f"normalized return   {score:.1f} (reference {low:g} to {high:g})"
        yield f"terminations        {self.n_terminated:,}"
        yield f"time-outs and cuts  {self.n_truncated:,}"
        yield f"environment         {source.env_spec.id if source.env_spec is not None else 'not named'}"
        yield f"observation space   {_short(source.observation_space)}{self._inferred('observation_space')}"
        yield f"action space        {_short(source.action_space)}{self._inferred('action_space')}"
        if self.at_bound is not None:
            yield f"actions at a bound  {_percent(self.at_bound / max(1, n_steps))}"
        for what in (*source.notes, *self.suspicious()):
            yield f"note: {what}"

    def _inferred(self, name: str) -> str:
        return " (from the arrays)" if name in self.source.inferred and getattr(self.source, name) is not None else ""

    def suspicious(self) -> Iterator[str]:
        """
        :return: what should be looked at before training
        """
        parts = {**{f"observations {key}".strip(): r for key, r in self.observations.items()}, "actions": self.actions}
        for name, found in {**parts, "rewards": self.rewards}.items():
            if found is None:
                continue
            if found.n_not_finite:
                yield f"{name}: {found.n_not_finite} entries are NaN or infinite: the data can't be loaded so"
            constant = np.flatnonzero((found.low == found.high).reshape(-1))
            if len(constant) and name != "rewards" and len(constant) < 50:
                yield f"{name}: entries {constant.tolist()} never vary"
            elif len(constant) and name == "rewards" and self.source.has_rewards:
                yield f"rewards are all {found.low:g}"
        if self.n_terminated == 0 and self.source.has_rewards:
            yield "no episode terminates: right if the task never ends early"
        if self.actions is not None and isinstance(self.source.action_space, spaces.Box):
            outside = _outside(self.source, self.actions)
            if len(outside):
                yield f"actions: entries {outside.tolist()} leave the bounds, and will be clipped"
        if len(self.source.lengths) > 1 and (self.source.lengths == 1).mean() > 0.5:
            yield "most episodes have one step: are ends of episodes marked at every row?"


def summarise(source: EpisodeSource) -> Summary:
    """
    :param source: a dataset, which is read once
    :return: what is in it
    """
    summary = Summary(source)
    for block in source.blocks(range(len(source.lengths))):
        _add(summary, block)
    return summary


def _add(summary: Summary, block: Block) -> None:
    flat = flatten_nested(block.observations) if isinstance(block.observations, Mapping) else {"": block.observations}
    for key, array in flat.items():
        summary.observations.setdefault(key, Range.like(array)).update(array)
    actions = np.asarray(block.actions)
    if summary.actions is None:
        summary.actions, summary.rewards = Range.like(actions), Range.like(np.asarray(block.rewards))
    assert summary.rewards is not None
    summary.actions.update(actions)
    summary.rewards.update(np.asarray(block.rewards))
    summary.n_terminated += int(block.terminations.sum())
    summary.n_truncated += int((block.ends & ~block.terminations).sum())
    bounds = _bounds(summary.source)
    if bounds is not None and actions.shape[1:] == bounds[0].shape:
        low, high = bounds
        margin = AT_BOUND * (high - low) / 2
        hits = ((actions <= low + margin) | (actions >= high - margin)).sum(axis=0)
        summary.at_bound = hits if summary.at_bound is None else summary.at_bound + hits
    if sum(map(len, summary.kept_actions)) < KEPT_ACTIONS:
        summary.kept_actions.append(actions[: KEPT_ACTIONS // 10].reshape(len(actions[: KEPT_ACTIONS // 10]), -1))


def _bounds(source: EpisodeSource) -> tuple[np.ndarray, np.ndarray] | None:
    """Of the actions as the source gives them."""
    space = source.action_space
    if not isinstance(space, spaces.Box):
        return None
    if source.scaled_actions:
        return np.full(space.shape, -1.0), np.full(space.shape, 1.0)
    return space.low.astype(np.float64), space.high.astype(np.float64)


def _outside(source: EpisodeSource, actions: Range) -> np.ndarray:
    bounds = _bounds(source)
    if bounds is None or bounds[0].shape != actions.low.shape:
        return np.array([], int)
    slack = 1e-5 * (bounds[1] - bounds[0])
    return np.flatnonzero(((actions.low < bounds[0] - slack) | (actions.high > bounds[1] + slack)).reshape(-1))


def _quantiles(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"mean {np.mean(values):.5g}, median {middle:.5g}, {low:.5g} to {high:.5g}"


def _percent(shares: np.ndarray) -> str:
    flat = [f"{100 * share:.3g} %" for share in np.reshape(shares, -1)]
    return ", ".join(flat[:12]) + (f", ... ({len(flat)} entries)" if len(flat) > 12 else "")


def _short(space: spaces.Space | None) -> str:
    if space is None:
        return "not known: a model needs env=..."
    if isinstance(space, spaces.Dict):
        return "Dict(" + ", ".join(f"{key}: {_short(entry)}" for key, entry in space.spaces.items()) + ")"
    if isinstance(space, spaces.Box):
        return f"Box({space.low.min():g}, {space.high.max():g}, {space.shape}, {space.dtype})"
    return str(space)


def draw(summary: Summary, path: str) -> None:
    """
    Draw histograms of returns, lengths and actions.

    :param summary: of a dataset
    :param path: picture to write
    :raises ImportError: if matplotlib is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"A picture needs matplotlib: {how_to_install('plots')}.") from error
    actions = np.concatenate(summary.kept_actions)
    n_shown = min(actions.shape[1], 9)
    rows = 1 + -(-n_shown // 3)
    figure = Figure(figsize=(9, 3 + 2.2 * (rows - 1)), layout="constrained")
    grid = figure.add_gridspec(rows, 6)
    for half, (title, values) in enumerate((("return", summary.source.returns), ("length", summary.source.lengths))):
        axes = figure.add_subplot(grid[0, 3 * half : 3 * half + 3])
        axes.hist(values, bins=40)
        axes.set(title=f"{title} of an episode", ylabel="episodes")
    for entry in range(n_shown):
        column = 2 * (entry % 3)
        axes = figure.add_subplot(grid[1 + entry // 3, column : column + 2])
        axes.hist(actions[:, entry], bins=60)
        axes.set(title=f"action {entry}", yticks=[])
    figure.suptitle(summary.source.name)
    figure.savefig(path)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """
    :param commands: sub-commands to add ``inspect`` to
    """
    parser = commands.add_parser("inspect", help="print what is in a dataset of any format that is read")
    parser.add_argument(
        "source", help="a Minari id, a file or a folder, with a prefix where it is not recognised: d4rl:<path>"
    )
    parser.add_argument("-o", "--output", help="picture to write: histograms of returns, lengths and actions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """
    Run the ``inspect`` command.

    :param args: its arguments
    """
    summary = summarise(open_dataset(args.source))
    print("\n".join(summary.lines()))
    if args.output:
        draw(summary, args.output)
        print(f"Wrote {args.output}")
