"""
Whatever the spaces, the data and the arguments: it trains and acts inside the bounds, or raises a documented error.

``-m slow`` tries twenty times as many examples. ``--hypothesis-show-statistics`` counts them.
"""

import warnings
from collections.abc import Callable
from typing import get_args, get_origin

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import CPQL, RACTD
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.envs.spaces import UnsupportedSpaceError, action_bounds, fitting_policy
from sb3_consistency.options import options_of
from sb3_consistency.training.updater import DivergenceError
from tests.conftest import ACTOR_CRITICS, ALGORITHMS, VectorEnv

DOCUMENTED = (ValueError, TypeError, DatasetError, DivergenceError)
TINY = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "buffer_size": 50, "seed": 0, "device": "cpu"}


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# --- spaces

EXTREMES = [0.0, 1.0, -1.0, 2.5, 1e-3, -7.0, 1e4, 1e-30, 1e30, -1e30, 3e38, -3e38, 1e-45, 16777217.0]


@st.composite
def action_spaces(draw):
    """Boxes with any finite bounds: tiny, huge, one-sided, all equal or all different."""
    shape = draw(st.sampled_from([(1,), (3,), (2, 2), (1, 1)]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    numbers = st.one_of(st.sampled_from(EXTREMES), st.floats(-1e38, 1e38))
    n = int(np.prod(shape))
    pairs = st.tuples(numbers, numbers)
    if draw(st.integers(0, 9)):  # one in ten may have a dimension without room
        pairs = pairs.filter(lambda pair: dtype(pair[0]) != dtype(pair[1]))
    ends = np.array(draw(st.lists(pairs, min_size=n, max_size=n)), dtype=dtype)
    return spaces.Box(ends.min(axis=1).reshape(shape), ends.max(axis=1).reshape(shape), shape, dtype)


@st.composite
def flat_spaces(draw):
    kind = draw(st.sampled_from(["box", "one-sided", "image", "discrete", "binary", "multi", "integers"]))
    if kind == "box":
        shape = draw(st.sampled_from([(1,), (3,), (2, 2), ()]))
        bound = draw(st.sampled_from([1.0, 1e-3, 1e4, 1e30, np.inf]))
        return spaces.Box(-bound, bound, shape, draw(st.sampled_from([np.float32, np.float64])))
    if kind == "one-sided":
        return spaces.Box(np.array([0.0, -np.inf, -1e20]), np.array([np.inf, 5.0, 1e20]), dtype=np.float64)
    if kind == "image":
        return spaces.Box(0, 255, draw(st.sampled_from([(36, 36, 3), (1, 36, 36), (4, 4), (5,)])), np.uint8)
    if kind == "discrete":
        return spaces.Discrete(draw(st.integers(1, 5)), start=draw(st.sampled_from([0, 0, 0, 0, 1, -2])))
    if kind == "binary":
        return spaces.MultiBinary(draw(st.sampled_from([1, 3])))
    if kind == "multi":
        return spaces.MultiDiscrete(draw(st.sampled_from([[2], [3, 4]])))
    return spaces.Box(-3, 3, (2,), np.int64)


observation_spaces = st.one_of(
    flat_spaces(), st.dictionaries(st.sampled_from(["a", "d", "e f", "b.c"]), flat_spaces(), min_size=1).map(spaces.Dict)
)


def sampled_arrays(observation_space, action_space, n=12, seed=0):
    """Transitions sampled from the spaces, in three episodes."""
    for space in (observation_space, action_space):
        space.seed(seed)

    def stack(rows):
        if isinstance(observation_space, spaces.Dict):
            return {key: np.stack([row[key] for row in rows]) for key in observation_space}
        return np.stack(rows)

    observations = [observation_space.sample() for _ in range(n + 1)]
    ends = np.arange(1, n + 1) % 4 == 0
    return {
        "observations": stack(observations[:-1]),
        "next_observations": stack(observations[1:]),
        "actions": np.stack([action_space.sample() for _ in range(n)]),
        "rewards": np.linspace(-1, 1, n),
        "terminations": ends & (np.arange(n) < 5),
        "truncations": ends & (np.arange(n) >= 5),
        "observation_space": observation_space,
        "action_space": action_space,
    }


def assert_acts_inside(model, observation):
    """Single and batched predictions have the right shape and type, and lie in the space."""
    space = model.action_space
    vector_env = model.get_env()
    batch = vector_env.reset() if vector_env is not None else observation
    for deterministic in (True, False):
        single, _ = model.predict(observation, deterministic=deterministic)
        assert single.dtype == space.dtype and space.contains(single), single
        several, _ = model.predict(batch, deterministic=deterministic)
        assert several.shape == (model.n_envs, *space.shape) and all(space.contains(action) for action in several), several


class BoundedRewardEnv(VectorEnv):
    """Its rewards stay finite for huge actions."""

    def step(self, action):
        with np.errstate(over="ignore"):
            observation, reward, *rest = super().step(action)
        return observation, max(reward, -1e6), *rest


def check_spaces(cls, observation_space, action_space):
    env = BoundedRewardEnv(observation_space, action_space)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of clipped actions and of spaces that SB3 thinks odd
            data = sampled_arrays(observation_space, action_space)
            model = cls(fitting_policy(observation_space), env, curriculum_steps=3, **TINY)
            model.load_dataset(data)
            model.pretrain(4)
            if not cls.offline_only:
                model.learn(4)
            assert_acts_inside(model, env.reset()[0])
    except DOCUMENTED as error:
        event(f"refused: {type(error).__name__}: {str(error)[:40]}")
        return error
    event("trained")
    return None


def any_spaces(cls, observation_space, action_space):
    check_spaces(cls, observation_space, action_space)


def any_bounded_action_space(cls, action_space):
    error = check_spaces(cls, spaces.Box(-1, 1, (2,), np.float32), action_space)
    flat = (action_bounds(action_space).half_range <= 0).any()
    assert isinstance(error, UnsupportedSpaceError) if flat else error is None, error


# --- data


@st.composite
def episodes(draw):
    """Arrays of episodes of any lengths and ends, rewards and observations of any finite size."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    kinds = draw(st.lists(st.sampled_from(["terminated", "truncated", "both", "unmarked"]), min_size=6, max_size=6))
    scale = draw(st.sampled_from([1.0, 1e-30, 1e6, 1e19, 1e30, 0.0]))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    n = sum(lengths)
    last = np.zeros(n, bool)
    last[np.cumsum(lengths) - 1] = True
    kind = np.repeat(kinds[: len(lengths)], lengths)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return {
        "observations": (scale * rng.uniform(-1, 1, (n, 3))).astype(dtype),
        "next_observations": (scale * rng.uniform(-1, 1, (n, 3))).astype(dtype),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(dtype),
        "rewards": (scale * rng.uniform(-1, 1, draw(st.sampled_from([(n,), (n, 1)])))).astype(dtype),
        "terminations": last & np.isin(kind, ["terminated", "both"]),
        "truncations": last & np.isin(kind, ["truncated", "both"]),
    }


FILTERS = {
    "top_fraction": [1.0, 0.5, 0.01, 0.0, 2.0],
    "heldout_fraction": [0.0, 0.0, 0.3, 0.99, 1.0],
    "episodes": [None, slice(1, None), slice(0, 0), [0], [99], -1],
    "reward_transform": ["none", "normalize", "antmaze", "minus_one", "iql_locomotion", "x", lambda r: r / 0],
}
MODEL_OPTIONS = {
    "n_steps": [1, 3],
    "keep_offline": [True, False],
    "optimize_memory_usage": [False, True],
    "horizon": [1, 4, 9],
    "history": [1, 3],
    "pad": [True, False],
}


def some_of(table):
    return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in table.items()})


def any_episodes(cls, data, n_envs, options, filters):
    box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    env = make_vec_env(lambda: BoundedRewardEnv(box, spaces.Box(-1, 1, (2,), np.float32)), n_envs=n_envs)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            model = cls("MlpPolicy", env, curriculum_steps=3, **TINY, **options)
            n_loaded = model.load_dataset(data, **filters)
            buffer = model.replay_buffer
            assert buffer.size() == -(-n_loaded // n_envs) and n_loaded <= len(data["actions"])
            assert buffer.dones[buffer.size() - 1].all()
            model.pretrain(4)
            assert_acts_inside(model, np.zeros(3, np.float32))
    except DOCUMENTED as error:
        event(f"refused: {type(error).__name__}: {str(error)[:40]}")
        return
    event("trained")


# --- arguments

ODD = [-1, 0, 1.5, -0.1, 1e-3, 1e30, float("nan"), float("inf"), -float("inf"), None, "many", True, [1], (1, 2), {}]


def values_of(hint, low, high, above):
    """A strategy for values of one type, near the lower end of their limits; None for what no declaration tells to draw."""
    kind = get_origin(hint) or hint
    if kind is bool:
        return st.booleans()
    start = above if above is not None else low if low > -np.inf else 0
    if kind is int:
        return st.integers(int(start) + (above is not None), int(min(high, start + 3)))
    if kind is float:
        return st.floats(start, min(high, start + 1), exclude_min=above is not None, width=32)
    if kind is tuple:
        return st.tuples(*(values_of(part, low, high, above) for part in get_args(hint)))
    if kind is str:
        return st.sampled_from(["step", "episode", "day"])
    if kind is Callable:
        return st.just(lambda progress: 1e-3)
    return st.none() if kind is type(None) else None


def allowed(declared):
    """Values that an option's declaration allows, or that only its own check can tell."""
    if declared.one_of:
        return st.one_of(st.sampled_from(declared.one_of), *[st.none()] * (type(None) in declared.members))
    # a text alone names a file or a device
    kinds = [hint for hint in declared.members if hint is not str]
    strategies = [values_of(hint, declared.low, declared.high, declared.above) for hint in kinds]
    return st.one_of([x for x in strategies if x is not None])


def outside(declared):
    """Values that an option's declaration forbids."""
    if declared.one_of or bool in declared.members:
        return st.just("none of them")
    forbidden = [] if declared.above is None else [declared.above]
    forbidden += [end for end in (declared.low - 1, declared.high + 1) if np.isfinite(end)]
    return st.sampled_from(forbidden)


def is_limited(declared):
    return declared.above is not None or declared.low > -np.inf or declared.high < np.inf


def drawn_options(cls):
    """Options whose declaration tells what they may be; compiling takes minutes."""
    declared = {name: o for name, o in options_of(cls).items() if o.stored and name != "compile"}
    plain = {bool, int, float, tuple}
    checked = {name: o for name, o in declared.items() if o.own_check or o.one_of or bool in o.members or is_limited(o)}
    return {name: o for name, o in checked.items() if o.one_of or plain & {get_origin(x) or x for x in o.members}}


DATA = {**sampled_arrays(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-2, 3, (2,), np.float32), n=24)}


@st.composite
def arguments(draw):
    """An algorithm, a few of its arguments, and which of them are out of their limits."""
    cls = draw(st.sampled_from([*ALGORITHMS, *ACTOR_CRITICS]))
    options = drawn_options(cls)
    given_arguments, wrong = {}, []
    for name in draw(st.lists(st.sampled_from(list(options)), min_size=1, max_size=3, unique=True)):
        declared = options[name]
        # more often than not an allowed value, or hardly any combination would get as far as training
        kind = draw(st.sampled_from(["allowed"] * 5 + ["odd"] + ["outside"]))
        if kind == "outside" and (declared.one_of or bool in declared.members or is_limited(declared)):
            wrong.append(name)
            given_arguments[name] = draw(outside(declared))
        else:
            given_arguments[name] = draw(st.sampled_from(ODD) if kind == "odd" else allowed(declared))
    return cls, given_arguments, wrong


def any_arguments(drawn):
    cls, given_arguments, wrong = drawn
    env = BoundedRewardEnv(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-2, 3, (2,), np.float32), length=5)
    defaults = {**TINY, "curriculum_steps": 3, "learning_starts": 4, "horizon": 4}
    if cls is not RACTD:
        del defaults["horizon"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = cls("MlpPolicy", env, **{**defaults, **given_arguments})
            assert not wrong, f"{wrong} of {given_arguments} passed"
            model.load_dataset(DATA)
            model.pretrain(4)
            if not cls.offline_only:
                model.learn(8)
            if model.can_act:
                assert_acts_inside(model, env.reset()[0])
    except DOCUMENTED as error:
        if isinstance(error, DivergenceError):
            event("diverged, and said so")
            return
        named = [name for name in given_arguments if name in str(error)]
        assert named, f"{error!r} names no argument of {given_arguments}"
        event(f"refused: {type(error).__name__}: {named[0]}")
        return
    event("trained")


# --- what the examples found


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.float32, -3e38, 3e38), (np.float64, -1.7e308, 1.7e308), (np.float32, 0.0, 1e-45), (np.float32, -7.0, 0.1)],
)
def test_actions_of_any_bounds_are_scaled_exactly(dtype, low, high):
    space = spaces.Box(np.array([low]), np.array([high]), dtype=dtype)
    model = CPQL("MlpPolicy", BoundedRewardEnv(spaces.Box(-1, 1, (3,)), space), **TINY)
    ends = np.array([[-1.0], [1.0], [0.0]], np.float32)
    actions = model.policy.unscale_action(ends)
    assert actions.dtype == dtype and all(space.contains(action) for action in actions)
    np.testing.assert_array_equal(actions[:2, 0], np.array([space.low[0], space.high[0]]))
    if high > 1e-40:
        np.testing.assert_allclose(model.policy.scale_action(actions), ends, atol=1e-6)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(3, start=1), "start at 0"),
        (spaces.Box(-1, 1, (), np.float32), "shape"),
        (spaces.Dict({"a.b": spaces.Box(-1, 1, (2,))}), "dots"),
        (
            spaces.Dict({"a": spaces.Box(0, 255, (36, 36, 3), np.uint8), "b": spaces.Box(0, 255, (3, 36, 36), np.uint8)}),
            "channels",
        ),
    ],
)
def test_observation_spaces_that_sb3_cannot_encode(space, message):
    with pytest.raises(ValueError, match=message):
        CPQL("MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy", VectorEnv(space), **TINY)


def test_integer_actions_are_refused():
    with pytest.raises(UnsupportedSpaceError, match="floating-point"):
        CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(0, 5, (2,), np.int64)), **TINY)


def test_one_transition_and_huge_equal_returns():
    data = sampled_arrays(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32), n=1)
    data["rewards"] = np.array([1e18])
    model = RACTD("MlpPolicy", VectorEnv(), curriculum_steps=3, horizon=4, **TINY)
    assert model.load_dataset(data) == 1
    model.pretrain(4)
    assert_acts_inside(model, np.zeros(3, np.float32))


def test_statistics_of_large_observations_are_finite():
    model = CPQL("MlpPolicy", VectorEnv(spaces.Box(-np.inf, np.inf, (3,), np.float32)), **TINY)
    data = sampled_arrays(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32))
    for key in ("observations", "next_observations"):
        data[key] = data[key] * np.float32(1e30)
    del data["observation_space"]
    model.load_dataset(data)
    std = model.policy.actor.obs_normalizer.entries["entry0"].std.numpy()
    np.testing.assert_allclose(std, data["observations"].astype(np.float64).std(axis=0), rtol=1e-3)


# --- the tests

algorithms = st.sampled_from(ALGORITHMS)
PROPERTIES = {
    any_spaces: (100, {"cls": algorithms, "observation_space": observation_spaces, "action_space": action_spaces()}),
    any_bounded_action_space: (60, {"cls": algorithms, "action_space": action_spaces()}),
    any_episodes: (
        120,
        {
            "cls": algorithms,
            "data": episodes(),
            "n_envs": st.integers(1, 3),
            "options": some_of(MODEL_OPTIONS),
            "filters": some_of(FILTERS),
        },
    ),
    any_arguments: (300, {"drawn": arguments()}),
}


@pytest.mark.parametrize("check", PROPERTIES)
def test_property(check):
    n_examples, strategies = PROPERTIES[check]
    examples(n_examples)(given(**strategies)(check))()


@pytest.mark.slow
@pytest.mark.parametrize("check", PROPERTIES)
def test_many_more_examples(check):
    n_examples, strategies = PROPERTIES[check]
    examples(20 * n_examples)(given(**strategies)(check))()
