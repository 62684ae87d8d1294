"""Options: declared once, checked, and one copy of the truth on a running model."""

import inspect

import numpy as np
import pytest
import torch as th

from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC
from sb3_consistency.options import MISSING, Options, option, options_of, shared_options
from tests.conftest import ALGORITHMS, SMALL

#: another valid value of options that have no limits to guess one from
OTHERS = {
    "actor_learning_rate": 1e-4,
    "action_noise": None,
    "cosine_lr_decay": True,
    "max_grad_norm": 5.0,
    "curriculum_steps": 7,
    "dataset": "some/other-v0",
    "dataset_kwargs": {"top_fraction": 0.5},
    "offline_fraction": 0.25,
    "alpha": 0.5,
    "train_sampling_steps": 2,
    "executed_steps": 3,
    "tracking_gains": (2.0, 1.0),
    "metric": "l2",
    "curriculum": (3, 20),
    "teacher": "file.zip",
    "expectile": 0.8,
    "reward_steps": 0.2,
    "teacher_steps": 0.3,
    "stride": 2,
    "pretrain_steps": 0,
}
CASES = [(cls, name) for cls in ALGORITHMS for name, o in options_of(cls).items() if not o.sb3]


def another(declared, value):
    if declared.name in OTHERS:
        return OTHERS[declared.name]
    if declared.one_of:
        return next(x for x in declared.one_of if x != value)
    if isinstance(value, bool):
        return not value
    if value is None:
        return 2
    if isinstance(value, int):
        return value + 1
    return value * 0.5 if value else 0.25


@pytest.fixture(scope="module")
def models():
    from tests.conftest import make_arrays

    return {cls: cls("MlpPolicy", dataset=make_arrays(), **SMALL) for cls in ALGORITHMS}


@pytest.mark.parametrize(("cls", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_an_option_acts_when_it_is_set_or_says_how_it_can_be(models, cls, name):
    model, declared = models[cls], options_of(cls)[name]
    before = vars(model)[declared.attribute]
    value = another(declared, before)
    if declared.fixed:
        with pytest.raises(AttributeError, match=rf"{name} can't be changed .* load\(..., {name}=...\)"):
            setattr(model, name, value)
        assert vars(model)[declared.attribute] is before
        return
    setattr(model, name, value)
    try:
        holders = [m for m in model.policy.modules() if name in shared_options(type(m), cls)]
        assert all(getattr(holder, name) == value for holder in holders)
        assert getattr(model, name) == value
    finally:
        setattr(model, name, before)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_every_option_is_documented_and_in_the_signature(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:3] == ["policy", "env", "learning_rate"]
    for name, declared in options_of(cls).items():
        assert declared.doc and name in parameters
        assert declared.default is MISSING or parameters[name].default is declared.default


def test_a_refused_value_changes_nothing(models):
    model = models[CPQL]
    refused = {"n_candidates": 0, "eta": -1.0, "bc_loss": "mse", "max_q_backup": "yes", "candidate_temperature": 0}
    for name, value in refused.items():
        before = getattr(model, name)
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            setattr(model, name, value)
        assert getattr(model, name) == before


def test_candidates_set_on_a_model_are_those_of_the_next_prediction(models):
    model, obs = models[ConsistencyAC], np.zeros((5, 3), np.float32)

    def passes(deterministic):
        rows = []
        handle = model.policy.actor.model.network.layers.register_forward_hook(lambda *_: None)
        original = model.policy.actor.model.sample
        model.policy.actor.model.sample = lambda noise, cond: rows.append((len(noise), len(cond))) or original(noise, cond)
        try:
            model.predict(obs, deterministic=deterministic)
        finally:
            handle.remove()
            del model.policy.actor.model.sample
        return rows[0]

    before = model.n_candidates, model.sampling_steps, model.n_eval_candidates
    try:
        model.n_candidates, model.sampling_steps, model.n_eval_candidates = 3, 4, 2
        assert passes(deterministic=False) == (4, 15)
        assert passes(deterministic=True) == (4, 10)
        model.n_candidates = model.n_eval_candidates = 1
        assert passes(deterministic=False) == passes(deterministic=True) == (4, 5)
    finally:
        model.n_candidates, model.sampling_steps, model.n_eval_candidates = before


def test_a_loss_set_on_a_model_is_that_of_the_next_step(models):
    model = models[ConsistencyBC]
    model.load_dataset(model.dataset)
    batch = model.data.sample(1, 32)[0]

    def loss():
        th.manual_seed(0)
        model.prepare_step()
        return float(model.actor_loss(batch)[0])

    losses = {}
    for name in ("ict", "reconstruction"):
        model.bc_loss = name
        losses[name] = loss()
        other = ConsistencyBC("MlpPolicy", dataset=model.dataset, bc_loss=name, **SMALL)
        other.policy.load_state_dict(model.policy.state_dict())
        th.manual_seed(0)
        assert float(other.actor_loss(batch)[0]) == losses[name]
    model.bc_loss = "ict"
    assert losses["ict"] != losses["reconstruction"]


def test_options_are_saved_whole_and_later_ones_know_what_was_before(models, tmp_path, monkeypatch):
    model = models[CPQL]
    model.save(tmp_path / "model")
    loaded = CPQL.load(tmp_path / "model")
    names = [o.attribute for o in options_of(CPQL).values() if not o.sb3 and o.name != "dataset"]
    assert {n: vars(loaded)[n] for n in names} == {n: vars(model)[n] for n in names}

    class Later(CPQL):
        weight: float = option(default=2.0, low=0, before=0.0, doc="an option that came later")

    assert Later.load(tmp_path / "model").weight == 0.0
    assert Later.load(tmp_path / "model", weight=3.0).weight == 3.0
    assert Later("MlpPolicy", dataset=model.dataset, **SMALL).weight == 2.0


def test_a_plain_value_is_a_new_default_and_keeps_everything_else():
    class Mine(RACTD):
        horizon = 8

    declared, theirs = options_of(Mine)["horizon"], options_of(RACTD)["horizon"]
    assert (declared.default, theirs.default) == (8, 16)
    assert (declared.doc, declared.low, declared.owner, declared.fixed) == (theirs.doc, theirs.low, theirs.owner, theirs.fixed)


def test_a_class_of_options_binds_like_a_constructor():
    class Thing(Options):
        size: int = option(kw_only=False, low=1, doc="size")
        rate: float | None = option(default=None, above=0, doc="rate")

    thing = Thing(3, rate=0.5)
    assert thing.option_values() == {"size": 3, "rate": 0.5}
    for call, message in {
        lambda: Thing(): "needs 'size'",
        lambda: Thing(1, 2): "takes 1 positional",
        lambda: Thing(1, size=2): "'size' twice",
        lambda: Thing(1, rat=2): "did you mean 'rate'",
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.slow
def test_options_set_on_a_compiled_model_act_too():
    from tests.conftest import make_arrays

    def after_changes(compile):
        model = CPQL("MlpPolicy", dataset=make_arrays(), compile=compile, **SMALL)
        sums = []
        for name, value in {"bc_loss": "ict", "max_q_backup": True, "actor_q": "min", "train_sampling_steps": 2}.items():
            setattr(model, name, value)
            model.pretrain(2)
            sums.append(float(sum(p.double().sum() for p in model.policy.actor.parameters())))
        return sums

    np.testing.assert_allclose(after_changes(True), after_changes(False), atol=1e-4)
