"""The gradient step: what compilation, reduced precision and the divergence guard may and may not change."""

import gc
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC, DivergenceError
from sb3_consistency.generative.networks import Mish
from sb3_consistency.training import gradient as acceleration
from sb3_consistency.training.updater import RunningMeans, lerp_where
from tests.conftest import ACTOR_CRITICS, ALGORITHMS, SMALL, VectorEnv, make_arrays

every = pytest.mark.parametrize("cls", ALGORITHMS)
WIDE = {"policy_kwargs": {"net_arch": [128, 128]}, "batch_size": 64}


def loaded(cls, **kwargs):
    model = cls("MlpPolicy", dataset=make_arrays(), **{**SMALL, **kwargs})
    model.load_dataset(model.dataset)
    return model


def weights(model):
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


def state_of(model):
    """Weights, moving averages and everything that the optimizers remember."""
    return {
        key: [x.clone() for x in th.utils._pytree.tree_leaves(value) if isinstance(x, th.Tensor)]
        for key, value in model.get_parameters().items()
    }


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert all(th.equal(x, y) for x, y in zip(a[key], b[key], strict=True)), key


# learning rates


@pytest.mark.parametrize("decay", [None, True, False])
@pytest.mark.parametrize("actor_rate", [None, 2e-3])
@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_learning_rates_fall_offline_and_stay_online(cls, actor_rate, decay, monkeypatch):
    monkeypatch.setattr("sb3_consistency.training.pretraining.CHUNK", 1)  # else one rate serves 64 gradient steps

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            networks = self.model.policy.actor, self.model.policy.critic
            rates.append([network.optimizer.param_groups[0]["lr"] for network in networks])
            logged.append([self.logger.name_to_value[f"train/{name}"] for name in ("actor_learning_rate", "learning_rate")])
            return True

    options = {"cosine_lr_decay": decay, "actor_learning_rate": actor_rate, "learning_starts": 0, **SMALL}
    model = cls("MlpPolicy", VectorEnv(), **options)
    model.load_dataset(make_arrays(action_dim=2))
    for run, phase_rate, falls in [(model.pretrain, 3e-3, decay is not False), (model.learn, 3e-4, decay is True)]:
        rates, logged = [], []
        run(20, callback=Watch())
        highest = [actor_rate or phase_rate, 3e-4]
        assert rates[1] == pytest.approx(highest, rel=0.05)
        assert rates[-1] == pytest.approx([(0.01 if falls else 1) * rate for rate in highest], rel=0.5)
        assert logged[2:18] == rates[2:18]


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_the_policy_clones_data_but_not_its_own_past(cls):
    model = cls("MlpPolicy", VectorEnv(), learning_starts=0, **SMALL).learn(4)
    assert model.alpha_now() == 0 and model.step_alpha is None
    model.load_dataset(make_arrays(action_dim=2))
    model.learn(4)
    assert model.alpha_now() == model.step_alpha == 1


# compilation


def assert_compiled_equals_plain(cls, **kwargs):
    plain, compiled = loaded(cls, **WIDE, **kwargs), loaded(cls, **WIDE, **kwargs, compile=True)
    for model in (plain, compiled):
        model.set_random_seed(1)
        model.pretrain(6)
    assert compiled.updater._gradients and all(loss.function.compiles for loss in compiled.updater._gradients.values())
    start = weights(loaded(cls, **WIDE, **kwargs))
    moved, difference = (weights(plain) - start).norm(), (weights(plain) - weights(compiled)).norm()
    assert difference < 0.01 * moved, (difference, moved)


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
    with warnings.catch_warnings():
        # torch itself warns of what it has deprecated
        warnings.filterwarnings("error", message=".*(could not be compiled|recompile).*")
        for seed in range(10):
            model = loaded(ConsistencyBC, compile=True, precision=precision, seed=seed).pretrain(2)
            assert all(loss.function.compiles for loss in model.updater._gradients.values())


def assert_compiled_choice_equals_plain(cls, n_rows, deterministic):
    options = {"n_candidates": 8, "n_eval_candidates": 8}
    plain, compiled = loaded(cls, **WIDE, **options), loaded(cls, **WIDE, **options, compile=True)
    obs = plain.replay_buffer.observations[:n_rows, 0]
    for _ in range(2):
        actions = []
        for model in (plain, compiled):
            th.manual_seed(2)
            actions.append(model.predict(obs, deterministic=deterministic)[0])
            # what is chosen changes with the weights, and nothing is compiled again for it
            with th.no_grad():
                model.policy.actor.model.network.layers[-1].bias += 0.1
        np.testing.assert_allclose(*actions, atol=1e-6)
        assert compiled.policy._compiled_choice.compiles
    return compiled


def test_compiled_choice_among_candidates_equals_the_plain_one():
    with th._dynamo.config.patch(error_on_recompile=True):
        model = assert_compiled_choice_equals_plain(CPQL, 1, False)
    obs = model.replay_buffer.observations[:1, 0]
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.policy._compiled_choice.function.__self__ is copied.policy
        copied.policy._compiled_choice.compiles = False  # as without a compiler: a copy is compiled anew
        th.manual_seed(3)
        copy_action, _ = copied.predict(obs)
        th.manual_seed(3)
        np.testing.assert_allclose(copy_action, model.predict(obs)[0], atol=1e-6)


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
    assert not model.updater._gradients["actor"].function.compiles and not th.equal(weights(model), start)


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
        assert model._n_updates == 3
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


def test_unknown_precision_and_slow_bf16(monkeypatch):
    with pytest.raises(ValueError, match="precision must be one of"):
        loaded(CPQL, precision="fp16")
    monkeypatch.setattr(acceleration, "_is_bf16_fast", lambda device: False)
    with pytest.warns(UserWarning, match="no bfloat16 arithmetic"):
        loaded(CPQL, precision="bf16")


# divergence


def poisoned(cls, **kwargs):
    """A model whose every reward has become infinite: the loader refuses such data, an environment may give it."""
    model = loaded(cls, **kwargs)
    model.pretrain(3)
    before = state_of(model)
    model.data.buffer.rewards[:] = np.inf
    return model, before


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_a_diverging_step_is_left_out_and_stops_the_run(cls):
    model, before = poisoned(cls)
    with pytest.raises(
        DivergenceError, match=r"critic loss .* not finite at gradient step 4 and \d+ times more.*on_divergence"
    ):
        model.pretrain(100)
    after = state_of(model)
    assert all(th.equal(x, y) for x, y in zip(before["critic.optimizer"], after["critic.optimizer"], strict=True))
    assert weights(model).isfinite().all()
    assert model._n_updates < 100, "the run should have stopped at the next look, not at the end"


def test_a_diverging_run_can_go_on():
    model, _ = poisoned(CPQL, on_divergence="continue")
    critic = [p.clone() for p in [*model.critic.parameters(), *model.critic_target.parameters()]]
    actor = [p.clone() for p in model.actor.parameters()]
    with pytest.warns(UserWarning, match="These steps were left out"):
        model.pretrain(10)
    now = [*model.critic.parameters(), *model.critic_target.parameters()]
    assert all(th.equal(x, y) for x, y in zip(critic, now, strict=True))
    assert not all(th.equal(x, y) for x, y in zip(actor, model.actor.parameters(), strict=True)), "the actor goes on"
    model.data.buffer.rewards[:] = 0
    model.pretrain(5)
    assert weights(model).isfinite().all()


def test_a_diverging_online_run_stops():
    model = CPQL("MlpPolicy", "Pendulum-v1", learning_starts=10, **SMALL)
    model.learn(20)
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(DivergenceError, match="critic loss"):
        model.learn(20, reset_num_timesteps=False)
    assert weights(model).isfinite().all()


def test_the_message_names_the_last_checkpoint():
    model, _ = poisoned(ConsistencyAC)
    model.resumption.last_checkpoint = "runs/checkpoint_3"
    with pytest.raises(DivergenceError, match="The last checkpoint is runs/checkpoint_3"):
        model.pretrain(5)


@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.AdamW])
def test_the_guard_without_reading_tensors_does_the_same(optimizer, monkeypatch):
    """What runs on a GPU: the fused optimizer looks at the flag itself."""
    kwargs = {"policy_kwargs": {"net_arch": [32, 32], "optimizer_class": optimizer}, "on_divergence": "continue"}
    models = [loaded(CPQL, **kwargs) for _ in range(2)]
    for model, may_read in zip(models, (True, False), strict=True):
        monkeypatch.setattr(model.updater, "reads_tensors", lambda *_, may_read=may_read: may_read)
        model.set_random_seed(1)
        model.pretrain(3)
        rewards = model.data.buffer.rewards
        saved = rewards.copy()
        rewards[:] = np.nan
        with pytest.warns(UserWarning, match="left out"):
            model.pretrain(3)
        rewards[:] = saved
        model.pretrain(3)
    assert_equal_states(state_of(models[0]), state_of(models[1]))
    steps = {int(s["step"]) for s in models[1].critic.optimizer.state.values()}
    assert steps == {6}, "Adam counts the steps that it took"


class NormalisedExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.norm = th.nn.BatchNorm1d(3)

    def forward(self, observations):
        return self.norm(observations)


@pytest.mark.parametrize("may_read", [True, False])
def test_a_diverging_step_leaves_batch_norm_alone(may_read, monkeypatch):
    small = {"net_arch": [32, 32], "features_extractor_class": NormalisedExtractor}
    model = loaded(CPQL, policy_kwargs=small, on_divergence="continue", normalize_observations=False)
    monkeypatch.setattr(model.updater, "reads_tensors", lambda *_: may_read)
    model.pretrain(3)
    before = [x.clone() for name, x in model.policy.state_dict().items() if "running_" in name]
    model.data.buffer.observations[:] = np.inf
    with pytest.warns(UserWarning, match="left out"):
        model.pretrain(3)
    after = [x for name, x in model.policy.state_dict().items() if "running_" in name]
    assert before and all(x.isfinite().all() for x in after)
    assert all(th.equal(x, y) for x, y in zip(before, after, strict=True)) or not may_read


def test_rl_zoo3_prunes_trials_that_diverge():
    assert issubclass(DivergenceError, ValueError)


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_layers_replaced_with_their_optimizer_are_trained(cls):
    model = loaded(cls).pretrain(1)
    model.actor.model.network.layers[-1] = th.nn.Linear(32, 1)
    model.actor.optimizer = th.optim.Adam(model.actor.parameters(), 1e-3)
    before = model.actor.model.network.layers[-1].weight.clone()
    model.pretrain(1)
    assert not th.equal(before, model.actor.model.network.layers[-1].weight)


def test_mish_keeps_its_tail_in_bf16():
    x = th.linspace(-8, 8, 8192)
    exact = th.nn.functional.mish(x)
    rounded = Mish()(x.bfloat16())
    assert rounded.dtype == th.bfloat16
    th.testing.assert_close(rounded.float(), th.nn.functional.mish(x.bfloat16().float()), rtol=0.01, atol=1e-4)
    assert (rounded.float() - exact).abs().max() < 0.05


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_gradient_is_laid_out_as_its_parameter(compile):
    """A fused optimizer reads both as flat memory."""
    a, b, w = (th.randn(size, requires_grad=True) for size in (3, 3, (4, 3)))
    frozen, unused = th.randn(3), th.randn(2, requires_grad=True)
    parameters = [a, b, w, frozen, unused]
    loss = acceleration.LossGradient(lambda x: ((a + b + frozen).sum() + (w.T * x).sum(), {}), parameters, compile=compile)
    x = th.randn(3, 4)
    value, _, gradients = loss(x)
    th.testing.assert_close(value, (a + b + frozen).sum().detach() + (w.detach().T * x).sum())
    for gradient, expected, parameter in zip(gradients, (th.ones(3), th.ones(3), x.T), (a, b, w), strict=False):
        assert th.equal(gradient, expected) and gradient.stride() == parameter.stride()
    assert gradients[3:] == [None, None]


class FrozenExtractor(BaseFeaturesExtractor):
    """A pretrained encoder, say, and what is learned on top of it."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.encoder, self.head = th.nn.Linear(3, 8), th.nn.Linear(8, 4)
        self.encoder.requires_grad_(False)

    def forward(self, observations):
        return self.head(self.encoder(observations).relu())


@every
def test_frozen_parameters_stay_as_they_are(cls):
    one_stage = {"teacher_steps": 100, "reward_steps": 1} if cls is RACTD else {}
    model = loaded(cls, policy_kwargs={"net_arch": [32, 32], "features_extractor_class": FrozenExtractor}, **one_stage)
    model.pretrain(2)
    network = getattr(model.policy, next(iter(model.losses())))
    extractor = next(module for module in network.modules() if isinstance(module, FrozenExtractor))
    extractor.head.bias.requires_grad_(False)
    before = [x.clone() for x in (extractor.encoder.weight, extractor.head.bias, extractor.head.weight)]
    model.pretrain(3)
    after = extractor.encoder.weight, extractor.head.bias, extractor.head.weight
    assert [th.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, False]


def test_a_conditional_moving_average():
    targets, sources = [th.zeros(3), th.ones(2, 2)], [th.ones(3), th.zeros(2, 2)]
    lerp_where(targets, sources, 0.25, th.tensor(False))
    assert th.equal(targets[0], th.zeros(3)) and th.equal(targets[1], th.ones(2, 2))
    lerp_where(targets, sources, 0.25, th.tensor(True))
    assert th.equal(targets[0], th.full((3,), 0.25)) and th.equal(targets[1], th.full((2, 2), 0.75))


def test_clipping_still_clips():
    model = loaded(ConsistencyBC, max_grad_norm=1e-3, learning_rate=1.0)
    model.pretrain(1)
    norm = th.nn.utils.get_total_norm([p.grad for p in model.actor.parameters()])
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_on_divergence_is_checked():
    with pytest.raises(ValueError, match="on_divergence must be one of"):
        loaded(CPQL, on_divergence="ignore")


# logging


def test_means_are_of_the_steps_that_have_the_metric():
    means = RunningMeans()
    kept = th.tensor(1.0)
    means.add({"a": kept})
    means.add({"a": th.tensor(4.0), "b": th.tensor(-2.0)})
    assert means.read() == {"a": 2.5, "b": -2.0}
    assert kept == 1.0
    assert RunningMeans().read() == {}


@every
def test_metrics_are_not_kept_for_every_step_until_the_next_log_line(cls):
    model, counts = loaded(cls), {}

    def count(scope, _):
        step = scope["self"].num_timesteps
        if step in (40, 55):
            counts[step] = sum(type(x) is th.Tensor for x in gc.get_objects())
        return True

    model.pretrain(60, callback=count)
    # the divergence guard keeps a flag per network
    assert counts[55] - counts[40] <= 15 * len(model.policy.trained_networks()), counts


class CountingExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.head, self.calls = th.nn.Linear(3, 3), 0

    def forward(self, observations):
        self.calls += 1
        return self.head(observations)


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_the_actors_loss_extracts_features_once(cls):
    model = loaded(cls, policy_kwargs={"net_arch": [32, 32], "features_extractor_class": CountingExtractor})
    model.pretrain(1)
    assert model.alpha_now() == 1, "both terms take part"
    assert model.actor.features_extractor.calls == 1
