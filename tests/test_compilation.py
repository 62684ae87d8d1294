"""Compilation and reduced precision change nothing but speed."""

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager
from copy import deepcopy
from unittest import mock

import numpy as np
import pytest
import torch as th

from sb3_consistency import CPQL, RACTD, ConsistencyBC
from sb3_consistency.algorithms import cpql
from sb3_consistency.generative.networks import Mish
from sb3_consistency.training import gradient as acceleration
from tests.conftest import (
    ACTOR_CRITICS,
    assert_equal_states,
    every,
    loaded,
    state_of,
    weights,
)

WIDE = {"policy_kwargs": {"net_arch": [128, 128]}, "batch_size": 64}

needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="PyTorch's compiler needs a C++ compiler",
)


@contextmanager
def all_is_compiled():
    """Something is compiled, and nothing runs uncompiled."""
    with warnings.catch_warnings(), mock.patch.object(th, "compile", wraps=th.compile) as compile:
        # torch itself warns of what it has deprecated
        warnings.filterwarnings("error", message=".*(could not be compiled|recompile).*")
        yield
        assert compile.called


def assert_compiled_equals_plain(cls, **kwargs):
    plain, compiled = loaded(cls, **WIDE, **kwargs), loaded(cls, **WIDE, **kwargs, compile=True)
    plain.set_random_seed(1)
    plain.pretrain(6)
    compiled.set_random_seed(1)
    with all_is_compiled():
        compiled.pretrain(6)
    start = weights(loaded(cls, **WIDE, **kwargs))
    moved, difference = (weights(plain) - start).norm(), (weights(plain) - weights(compiled)).norm()
    assert difference < 0.01 * moved, (difference, moved)


@needs_a_compiler
def test_compiled_losses_equal_plain_ones():
    with th._dynamo.config.patch(error_on_recompile=True):
        assert_compiled_equals_plain(CPQL, eta=lambda step: 1.0 + step)


@pytest.mark.slow
@every
def test_compiled_losses_of_every_algorithm(cls):
    # two stages of a planner end in these few steps
    assert_compiled_equals_plain(cls, **({"teacher_steps": 2, "reward_steps": 2} if cls is RACTD else {}))


@pytest.mark.slow
@pytest.mark.parametrize("precision", acceleration.PRECISIONS)
def test_compilation_works_in_many_models_of_one_process(precision):
    for seed in range(10):
        with all_is_compiled():
            loaded(ConsistencyBC, compile=True, precision=precision, seed=seed).pretrain(2)


def assert_compiled_choice_equals_plain(cls, n_rows, deterministic):
    options = {"n_candidates": 8, "n_eval_candidates": 8}
    plain = loaded(cls, **WIDE, **options)
    obs = plain.replay_buffer.observations[:n_rows, 0]
    with all_is_compiled():
        compiled = loaded(cls, **WIDE, **options, compile=True)
        for _ in range(2):
            actions = []
            for model in (plain, compiled):
                actions.append(seeded_actions(model, obs, deterministic))
                # what is chosen changes with the weights, and nothing is compiled again for it
                shift_actions(model)
            np.testing.assert_allclose(*actions, atol=1e-6)
    return compiled


def seeded_actions(model, obs, deterministic=False):
    th.manual_seed(2)
    return model.predict(obs, deterministic=deterministic)[0]


def shift_actions(model):
    with th.no_grad():
        model.policy.actor.model.network.layers[-1].bias += 0.1


@needs_a_compiler
def test_compiled_choice_among_candidates_equals_the_plain_one(monkeypatch):
    with th._dynamo.config.patch(error_on_recompile=True):
        model = assert_compiled_choice_equals_plain(CPQL, 1, False)
    obs = model.replay_buffer.observations[:1, 0]
    expected = seeded_actions(model, obs)
    monkeypatch.setattr(th, "compile", lambda function, **_: function)  # a copy is compiled anew
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_allclose(seeded_actions(copied, obs), expected, atol=1e-6)
        shift_actions(copied)
        assert np.abs(seeded_actions(copied, obs) - expected).min() > 1e-3, "it chooses among the original's actions"
        np.testing.assert_allclose(seeded_actions(model, obs), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_compiled_choice_of_every_algorithm(cls, deterministic):
    assert_compiled_choice_equals_plain(cls, 3, deterministic)


def test_without_a_compiler_training_goes_on_with_a_warning(monkeypatch):
    def broken(function, **kwargs):
        def run(batch):
            raise th._dynamo.exc.TorchDynamoException("no C++ compiler")

        return run

    monkeypatch.setattr(acceleration.th, "compile", broken)
    model = loaded(ConsistencyBC, compile=True)
    with pytest.warns(UserWarning, match=r"compile=True: actor_loss could not be compiled .*no C\+\+ compiler"):
        model.pretrain(3)
    plain = loaded(ConsistencyBC)
    plain.pretrain(3)
    assert_equal_states(state_of(model), state_of(plain))


def test_code_that_can_not_be_generated(monkeypatch):
    from torch._inductor import compile_fx
    from torch._inductor.exc import InductorError

    def fails(*args, **kwargs):
        raise InductorError(RuntimeError("no code"), th.nn.Module)

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", fails)
    model = loaded(ConsistencyBC, compile=True)
    start = weights(model)
    uncached = th._inductor.config.patch(force_disable_caches=True)
    with uncached, pytest.warns(UserWarning, match="actor_loss could not be compiled and runs uncompiled"):
        model.pretrain(3)
    assert not th.equal(weights(model), start)


@pytest.mark.slow
def test_really_without_a_compiler(tmp_path):
    code = """
        import warnings
        from sb3_consistency import CPQL
        from tests.conftest import SMALL, make_arrays
        model = CPQL("MlpPolicy", dataset=make_arrays(), compile=True, **SMALL)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.pretrain(3)
            model.predict(model.replay_buffer.observations[0])
        assert model.n_updates == 3
        assert sum("could not be compiled" in str(w.message) for w in caught) == 3, [str(w.message) for w in caught]
    """
    env = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=env)


def test_compiled_mish_has_the_same_formula(monkeypatch):
    x = th.linspace(-30, 30, 6001, dtype=th.float64, requires_grad=True)
    (expected,) = th.autograd.grad(th.nn.functional.mish(x).sum(), x)
    monkeypatch.setattr(th.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(th.compiler, "is_exporting", lambda: False)
    y = Mish()(x)
    th.testing.assert_close(y, th.nn.functional.mish(x), rtol=1e-6, atol=1e-9)
    th.testing.assert_close(th.autograd.grad(y.sum(), x)[0], expected, rtol=1e-6, atol=1e-8)


# precision


@every
def test_bf16_gives_nearly_the_same_gradient(cls):
    gradients = {}
    for precision in acceleration.PRECISIONS:
        model = loaded(cls, **WIDE, precision=precision)
        model.set_random_seed(1)
        model.pretrain(1)
        gradients[precision] = th.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None])
    exact, rounded = gradients["float32"], gradients["bf16"]
    assert not th.equal(exact, rounded), "nothing was computed in bfloat16"
    assert th.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.99


@every
def test_bf16_keeps_weights_moments_and_values_in_float32(cls):
    model = loaded(cls, **WIDE, precision="bf16").pretrain(3)
    assert all(x.dtype == th.float32 for xs in state_of(model).values() for x in xs if x.is_floating_point())
    assert weights(model).isfinite().all()
    if cls in ACTOR_CRITICS:
        batch = next(model.batches(1, 8))
        with acceleration.autocast("bf16", model.device):
            values = model.critic(batch.observations, batch.actions)
            actions = model.actor.sample(model.actor.features(batch.observations))
        assert values.dtype == actions.dtype == th.float32
        # the last layer is not rounded to the 8 bits of bfloat16
        assert not th.equal(values, values.bfloat16().float()) and not th.equal(actions, actions.bfloat16().float())


@pytest.mark.parametrize("options", [{"max_q_backup": True}, {"bc_loss": "distill", "target_candidates": 8}])
def test_actions_are_compared_in_float32(options, monkeypatch):
    """The values of a state's candidates differ by less than bfloat16 rounds."""
    model = loaded(CPQL, **WIDE, **options)
    batch = next(model.batches(1, 64))
    # the values themselves are the choice, of candidates that are the same with autocast and without
    monkeypatch.setattr(cpql, "choose_candidate", lambda q_values, actions: q_values[:, :1])
    for name in ("actor", "actor_target"):
        monkeypatch.setattr(getattr(model.policy, name), "sample", lambda features, *args: features[:, :1].tanh())
        monkeypatch.setattr(getattr(model.policy, name).model, "denoise", lambda noise, features: noise[0].tanh())
    if model.distills:
        monkeypatch.setattr(model.teacher.model, "sample", lambda noise, features: noise[0].tanh())

    def compared():
        th.manual_seed(0)
        if not model.distills:
            return model.next_value(batch)
        features = model.actor.features(batch.observations)
        return model.distillation_target(batch.observations, model.actor_noise(features))

    exact = compared()
    with acceleration.autocast("bf16", model.device):
        th.testing.assert_close(compared(), exact)


def test_unknown_precision_and_slow_bf16(monkeypatch):
    with pytest.raises(ValueError, match="precision must be one of"):
        loaded(CPQL, precision="fp16")
    monkeypatch.setattr(acceleration, "_is_bf16_fast", lambda device: False)
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic"):
        loaded(CPQL, precision="bf16")


def test_mish_keeps_its_tail_in_bf16():
    x = th.linspace(-8, 8, 8192)
    exact = th.nn.functional.mish(x)
    rounded = Mish()(x.bfloat16())
    assert rounded.dtype == th.bfloat16
    th.testing.assert_close(rounded.float(), th.nn.functional.mish(x.bfloat16().float()), rtol=0.01, atol=1e-4)
    assert (rounded.float() - exact).abs().max() < 0.05
