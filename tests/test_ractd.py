"""RACTD: teacher and student against closed forms, windows, stages, plans."""

import copy
import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_consistency import CPQL, RACTD
from sb3_consistency.data.buffer import Segment
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.generative.consistency import boundary_scalings
from sb3_consistency.generative.edm import EDMModel, heun_step, window_distance
from sb3_consistency.generative.schedules import karras_sigma
from sb3_consistency.generative.temporal import (
    TemporalMlp,
    TemporalUnet,
    coloured_noise,
    cosine_transform,
    make_temporal_network,
)
from sb3_consistency.generative.trajectory import TrajectoryConsistencyModel
from sb3_consistency.planning.tracking import forces, planned_states
from sb3_consistency.planning.windows import Windows, discounted_returns
from tests.conftest import SMALL, VectorEnv, make_arrays
from tests.test_contract import assert_same, box_env

# --- the maths: data x0 ~ N(0, S^2), where the ODE's solution is x_s = x_t sqrt((S^2 + s^2) / (S^2 + t^2))

S = 0.2
SIGMA_MIN = 0.02


def exact_denoiser(x, sigma):
    return x * (S**2 / (S**2 + sigma**2)).view(-1, 1, 1)


def exact_jump(x, t, s):
    return x * th.sqrt((S**2 + s**2) / (S**2 + t**2)).view(-1, 1, 1)


class Backbone(nn.Module):
    """A network for which c_skip x + c_out F(c_in x) is the given function of x and the noise levels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, scaled_x, cond, *levels):
        sigmas = [level.exp() for level in levels]
        c_skip, c_out, c_in = (c.view(-1, 1, 1) for c in boundary_scalings(sigmas[0], SIGMA_MIN))
        x = scaled_x / c_in
        return (self.function(x, *sigmas) - c_skip * x) / c_out.clamp(min=1e-9)

    def at_levels(self, levels, cond):
        return lambda x, i: self(x, cond, *(x.new_full((1,), level) for level in levels[i]))


def exact_g(x, t, s):
    """g of the exact jump, G = (s/t) x + (1 - s/t) g; on the diagonal the denoiser."""
    share = (s / t).view(-1, 1, 1)
    return th.where(share > 1 - 1e-9, exact_denoiser(x, t), (exact_jump(x, t, s) - share * x) / (1 - share).clamp(min=1e-9))


def exact_teacher(function=exact_denoiser, **kwargs):
    model = EDMModel((4, 2), 1, network="mlp", **kwargs).double()
    model.network = Backbone(function)
    return model


def exact_student(**kwargs):
    model = TrajectoryConsistencyModel((4, 2), 1, network="mlp", **kwargs).double()
    model.network = Backbone(exact_g)
    return model


def draws(n, seed=0):
    generator = th.Generator().manual_seed(seed)
    x0, noise = (th.randn(n, 4, 2, dtype=th.float64, generator=generator) for _ in range(2))
    return S * x0, noise, th.rand(n, 4, dtype=th.float64, generator=generator), th.zeros(n, 1, dtype=th.float64)


@pytest.mark.parametrize("metric", ["l2", "pseudo_huber", "pseudo_huber_squared"])
def test_teacher_loss_is_smallest_for_the_exact_denoiser(metric):
    x0, noise, u, cond = draws(20_000)

    def loss(factor):
        model = exact_teacher(lambda x, sigma: factor * exact_denoiser(x, sigma), metric=metric)
        return model.loss(x0, cond, noise=noise, u=u[:, :1]).mean().item()

    assert loss(1.0) < min(loss(0.95), loss(1.05))


def test_teacher_loss_is_the_weighted_posterior_variance():
    x0, noise, u, cond = draws(50_000)
    model = exact_teacher()
    sigma = model.log_normal_sigma(u[:, 0])
    assert sigma.min() == SIGMA_MIN and sigma.log().median().item() == pytest.approx(-1.2, abs=0.02)
    expected = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * S**2 * sigma**2 / (S**2 + sigma**2)
    assert model.loss(x0, cond, noise=noise, u=u[:, :1]).mean().item() == pytest.approx(expected.mean().item(), rel=0.01)


def test_teacher_samples_the_data():
    model = exact_teacher()
    n_calls = 0

    def count(*args):
        nonlocal n_calls
        n_calls += 1

    model.network.register_forward_hook(count)
    noise = th.randn(model.noise_shape(20_000), dtype=th.float64)
    samples = model.sample(noise, th.zeros(20_000, 1, dtype=th.float64))
    assert n_calls == 158  # 79 Heun steps over 80 levels
    assert samples.std().item() == pytest.approx(math.sqrt(S**2 + SIGMA_MIN**2), rel=0.01)


def test_heun_is_of_second_order():
    model, errors = exact_teacher(), []
    for n in (40, 80, 160, 320):
        grid = (n + 1, model.sigma_min, model.sigma_max, model.rho)
        sigmas = karras_sigma(th.arange(n, -1, -1, dtype=th.float64), *grid).unsqueeze(-1)
        x = th.full((1, 4, 2), 50.0, dtype=th.float64)
        exact = exact_jump(x, sigmas[0], sigmas[-1])
        for t, u in pairwise(sigmas):
            x = heun_step(exact_denoiser, x, t, u)
        errors.append((x - exact).abs().max().item())
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([4, 4, 4], abs=0.4)


def test_one_heun_step_is_the_textbooks():
    x, t, u = th.ones(1, 4, 2, dtype=th.float64), th.tensor([2.0]), th.tensor([1.0])
    slope = lambda x, t: (x - exact_denoiser(x, t)) / t  # noqa: E731
    euler = x + (u - t) * slope(x, t)
    expected = x + (u - t) / 2 * (slope(x, t) + slope(euler, u))
    assert th.allclose(heun_step(exact_denoiser, x, t, u), expected)


def test_jump_to_the_same_level_is_the_identity():
    model = TrajectoryConsistencyModel((8, 3), 5, network_kwargs={"net_arch": [16, 16]}).eval()
    x, t, cond = 50 * th.randn(16, 8, 3), model.sigma_at(th.linspace(0, 79, 16)), th.randn(16, 5)
    assert th.equal(model(x, t, t, cond), x)
    assert not th.allclose(model(x, t, t / 2, cond), x)


def test_exact_student_jumps_along_the_ode():
    model = exact_student()
    x = th.randn(3, 4, 2, dtype=th.float64)
    t, s = th.tensor([80.0, 5.0, 0.3], dtype=th.float64), th.tensor([2.0, 0.02, 0.1], dtype=th.float64)
    assert th.allclose(model(x, t, s, th.zeros(3, 1)), exact_jump(x, t, s))


@pytest.mark.parametrize("metric", ["l2", "pseudo_huber", "pseudo_huber_squared", "pseudo_huber_norm"])
def test_distillation_loss_of_the_exact_student_vanishes_as_the_grid_is_refined(metric):
    x0, noise, u, cond = draws(4000)
    losses = []
    for n_levels in (10, 20, 40, 80):
        model = exact_student(n_levels=n_levels, distillation_metric=metric)
        losses.append(model.distillation_loss(x0, cond, noise=noise, u=u[:, :2], teacher=exact_denoiser).mean().item())
    # Heun's error per step is O(h^3): even the plain distance falls at least 4-fold
    assert all(a > 4 * b for a, b in pairwise(losses))


def test_distillation_tells_a_wrong_student():
    x0, noise, u, cond = draws(4000)
    right, wrong = exact_student(), exact_student()
    wrong.network = Backbone(lambda x, t, s: exact_denoiser(x, t))
    loss = [
        m.distillation_loss(x0, cond, noise=noise, u=u[:, :2], teacher=exact_denoiser).mean().item() for m in (right, wrong)
    ]
    assert loss[1] > 1000 * loss[0]


def test_gradient_of_the_distillation_reaches_only_the_jump():
    """Weights of the carrying pass and of the target get none: the gradient is that of a student before a frozen copy."""
    model = TrajectoryConsistencyModel((4, 2), 1, network="mlp", network_kwargs={"net_arch": [16]}).double()
    frozen = TrajectoryConsistencyModel((4, 2), 1, network="mlp", network_kwargs={"net_arch": [16]}).double()
    frozen.load_state_dict(model.state_dict())
    x0, noise, u, cond = draws(32)
    loss = model.distillation_loss(x0, cond, noise=noise, u=u[:, :2], teacher=exact_denoiser).sum()
    level = 1 + (u[:, 0] * 79).floor()
    end = (u[:, 1] * level).floor()
    t, below, s = (model.sigma_at(n) for n in (level, level - 1, end))
    x_t = x0 + t.view(-1, 1, 1) * noise
    target = frozen.jump_to_end(frozen(heun_step(exact_denoiser, x_t, t, below), below, s, cond), s, cond).detach()
    explicit = window_distance(frozen.jump_to_end(model(x_t, t, s, cond), s, cond), target, "pseudo_huber_norm").sum()
    grads = [th.autograd.grad(value, list(model.parameters())) for value in (loss, explicit)]
    assert loss.item() == pytest.approx(explicit.item()) and loss > 0
    assert all(th.allclose(a, b) for a, b in zip(*grads, strict=True))


def test_trained_weights_are_not_used_without_a_gradient():
    """Older PyTorch's autocast hands what it casts without gradient on to the pass that trains."""
    model = TrajectoryConsistencyModel((4, 2), 1, network="mlp", network_kwargs={"net_arch": [16]})
    uses = []
    model.network.register_forward_pre_hook(
        lambda network, _: uses.append((th.is_grad_enabled(), next(network.parameters()).requires_grad))
    )
    x0, noise, u, cond = (x.float() for x in draws(8))
    model.distillation_loss(x0, cond, noise=noise, u=u[:, :2], teacher=exact_denoiser)
    assert uses == [(False, False), (False, False), (True, True), (True, False)]


@pytest.mark.parametrize("dsm_target", ["jump", "denoiser"])
def test_denoising_loss_draws_low_and_high_levels(dsm_target):
    model = exact_student(dsm_target=dsm_target)
    seen = []
    model.network.function = lambda x, t, s: seen.append((t, s)) or exact_g(x, t, s)
    x0, noise, u, cond = draws(10_000)
    loss, prediction = model.denoising_loss(x0, cond, noise=noise, u=u[:, 2:])
    assert loss.shape == (10_000,) and prediction.shape == x0.shape
    ((t, s),) = seen
    high = t[u[:, 2] >= 0.5]
    assert high.min().item() == pytest.approx(0.76, abs=0.01) and high.max().item() == pytest.approx(80, rel=0.01)
    assert t[u[:, 2] < 0.5].log().median().item() == pytest.approx(-1.2, abs=0.05)
    assert th.equal(s, t) if dsm_target == "denoiser" else (s == SIGMA_MIN).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_students_steps_keep_the_distribution(steps, gamma):
    model = exact_student(ctm_gamma=gamma)
    noise = th.randn(model.noise_shape(20_000, steps), dtype=th.float64)
    samples = model.sample(noise, th.zeros(20_000, 1, dtype=th.float64))
    assert samples.std().item() == pytest.approx(math.sqrt(S**2 + SIGMA_MIN**2), rel=0.02)


def test_deterministic_jumps_follow_the_ode():
    model = exact_student(ctm_gamma=1.0)
    noise, cond = th.randn(model.noise_shape(50, 4), dtype=th.float64), th.zeros(50, 1, dtype=th.float64)
    along = model.sample_ode(noise, cond)
    assert th.allclose(along, model.sample_ode(noise[:1], cond))
    assert not th.allclose(along, model.sample(noise, cond), atol=0.01)


def test_initial_noise_scale():
    noise = th.ones(1, 2, 4, 2, dtype=th.float64)
    for scale, model in ((1.0, exact_student(initial_noise_scale=1.0)), (80.0, exact_student())):
        expected = scale * math.sqrt((S**2 + SIGMA_MIN**2) / (S**2 + 80**2))
        assert th.allclose(model.sample(noise, th.zeros(2, 1)), th.tensor(expected, dtype=th.float64))


def test_few_hidden_units_denoise_a_long_window():
    """Of data that are always 0 all is noise, at every level; and where no level was trained the model stays sane."""
    th.manual_seed(0)
    model = EDMModel((32, 2), 1, network="mlp", network_kwargs={"net_arch": [8]})
    optimizer, data, cond = th.optim.Adam(model.parameters(), 1e-2), th.zeros(256, 32, 2), th.zeros(256, 1)
    for _ in range(300):
        loss = model.loss(data, cond, noise=th.randn_like(data), u=th.rand(256, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for sigma in (0.03, 0.1, 0.3, 3.0, 80.0):
        with th.no_grad():
            error = model(sigma * th.randn(256, 32, 2), th.full((1,), sigma), cond).square().mean().sqrt()
        assert error < 0.15 * min(sigma, 1), sigma


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_warm_started_student_denoises_as_the_teacher(network):
    options = {"network": network, "network_kwargs": {"net_arch": [16, 16]}}
    teacher = EDMModel((8, 3), 5, **options).eval()
    for p in teacher.parameters():
        th.nn.init.normal_(p, std=0.1)
    student = TrajectoryConsistencyModel((8, 3), 5, **options).eval()
    student.warm_start(teacher)
    t = teacher.sigma_at(th.linspace(1, 79, 16))
    x, cond = t.view(-1, 1, 1) * th.randn(16, 8, 3), th.randn(16, 5)
    for s in (t, t / 2, th.full_like(t, SIGMA_MIN)):
        assert th.allclose(student.scaled_network(x, cond, t, s), teacher(x, t, cond), atol=1e-5)
    grown = [
        name for name, p in student.network.named_parameters() if p.shape != teacher.network.state_dict().get(name, p).shape
    ]
    assert grown and all("film" in name or network == "mlp" for name in grown)


@pytest.mark.parametrize("n_levels", [1, 2])
@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_known_levels_give_the_same_outputs_and_gradients(network, n_levels):
    net = make_temporal_network(network, (8, 3), 5, n_levels=n_levels, net_arch=[16, 32])
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)  # the shortcut starts at zero
    x, cond = th.randn(2, 6, 8, 3), th.randn(6, 5)
    levels = [(0.7, -2.0)[:n_levels], (-1.5, -3.0)[:n_levels]]
    fast = net.at_levels(levels, cond)
    for i in range(2):
        slow = net(x[i], cond, *(th.full((1,), level) for level in levels[i]))
        assert th.allclose(fast(x[i], i), slow, atol=1e-4)
        gradients = [
            th.autograd.grad(y.square().mean(), list(net.parameters()), retain_graph=True) for y in (fast(x[i], i), slow)
        ]
        assert all(th.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*gradients, strict=True))


def test_cosine_transform_tells_frequencies():
    cosines = cosine_transform(8).double()
    assert th.allclose(cosines @ cosines.T, th.eye(8, dtype=th.float64), atol=1e-6)
    assert th.allclose(cosines[0], cosines[0, 0].expand(8))
    wave = th.cos(math.pi * 3 * (th.arange(8, dtype=th.float64) + 0.5) / 8)
    assert th.allclose(cosines @ wave, 2 * th.eye(8, dtype=th.float64)[3], atol=1e-6)


def test_coloured_noise_is_smooth_and_keeps_its_variance():
    th.manual_seed(0)
    noise, cosines = th.randn(20_000, 8, 2), cosine_transform(8)
    white, smooth = (coloured_noise(noise, th.full((20_000,), slope), cosines) for slope in (0.0, 2.0))
    assert th.allclose(cosines @ white, noise, atol=1e-5)
    for moved in (white, smooth):
        assert moved.square().mean() == pytest.approx(1, abs=0.02)
    spectrum = (cosines @ smooth).square().mean(dim=(0, 2))
    assert th.allclose(spectrum / spectrum[0], th.arange(1.0, 9).pow(-4), rtol=0.1)


def test_metrics_of_windows():
    a, b = th.tensor([[[3.0, 0.0]]]), th.zeros(1, 1, 2)
    c = 0.00054 * math.sqrt(2)
    assert window_distance(a, b) == 4.5
    assert window_distance(a, b, "pseudo_huber") == pytest.approx((math.sqrt(9 + c**2) - c) / 2)
    assert window_distance(a, b, "pseudo_huber_norm") == pytest.approx(math.sqrt(9 + c**2) - c)
    assert window_distance(a, b, "pseudo_huber_squared") == pytest.approx((math.sqrt(81 + c**2) - c) / 2)


def test_networks_tell_bad_shapes():
    with pytest.raises(ValueError, match="horizon must be a multiple of 4"):
        TemporalUnet((10, 2), 3)
    with pytest.raises(ValueError, match="net_arch"):
        TemporalUnet((8, 2), 3, net_arch=[])
    with pytest.raises(ValueError, match="network"):
        EDMModel((8, 2), 3, network="x")
    x, cond, level = th.randn(4, 8, 2), th.randn(4, 3), th.zeros(1)
    for network in (TemporalUnet((8, 2), 3, net_arch=[12, 20], n_levels=2), TemporalMlp((8, 2), 3, net_arch=[], n_levels=2)):
        assert network.eval()(x, cond, level, level).shape == x.shape


@pytest.mark.parametrize(
    "kwargs",
    [
        {"metric": "x"},
        {"n_levels": 1},
        {"sigma_min": 90},
        {"initial_noise_scale": 0},
        {"sampling_steps": 0},
        {"ctm_gamma": 2},
        {"dsm_target": "x"},
        {"distillation_metric": "x"},
    ],
)
def test_bad_options_of_the_student_name_themselves(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        TrajectoryConsistencyModel((4, 2), 1, **kwargs)


def test_student_needs_a_teacher():
    model = exact_student()
    x0, noise, u, cond = draws(2)
    with pytest.raises(ValueError, match="teacher"):
        model.loss(x0, cond, noise=noise, u=u)
    assert model.loss(x0, cond, noise=noise, u=u, target=exact_denoiser).shape == (2,)


# --- windows


def filled_buffer(n_rows, size, n_envs=1, episode=7, **kwargs):
    """Observation and action tell environment and time: 1000 env + step. Every ``episode`` steps one ends."""
    box = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    buffer = ReplayBuffer(size * n_envs, box, spaces.Box(-1e4, 1e4, (1,), np.float32), "cpu", n_envs, **kwargs)
    for t in range(n_rows):
        tag = (1000 * np.arange(n_envs) + t).astype(np.float32)
        done = np.array([(t + 2 * e) % episode == episode - 1 for e in range(n_envs)])
        buffer.add(tag[:, None], tag[:, None] + 1, tag[:, None], np.ones(n_envs), done, [{}] * n_envs)
    return buffer


def all_windows(windows):
    at = windows.at(windows.starts)
    return windows.take(windows.buffer.actions, at.rows, at.columns)[..., 0], at


@pytest.mark.parametrize(("n_rows", "size"), [(30, 30), (30, 40), (75, 30), (31, 30)])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("memory", [False, True])
def test_full_windows_are_consecutive_steps_of_one_episode(n_rows, size, n_envs, memory):
    buffer = filled_buffer(n_rows, size, n_envs, optimize_memory_usage=memory, handle_timeout_termination=not memory)
    windows = Windows(buffer, horizon=3, history=2, pad=False, gamma=0.9)
    values, at = all_windows(windows)
    oldest = max(0, n_rows - size + int(memory and n_rows >= size))
    expected = set()
    for env in range(n_envs):
        ends = [t for t in range(oldest, n_rows) if (t + 2 * env) % 7 == 6 or t == n_rows - 1]
        for first, last in pairwise([oldest - 1, *ends]):
            expected |= {tuple(1000 * env + t + i for i in range(3)) for t in range(first + 1, last - 1)}
    assert {tuple(v) for v in values.astype(int).tolist()} == expected and len(values) == len(expected)
    assert not at.padded.any()
    # the step before, or the first one again at the start of an episode
    past = windows.take(buffer.observations, at.past, at.columns)[..., 0]
    assert (past[:, 1] == values[:, 0]).all()
    t, env = values[:, 0] % 1000, values[:, 0] // 1000
    at_start = ((t + 2 * env) % 7 == 0) | (t == oldest)
    np.testing.assert_array_equal(past[:, 0], np.where(at_start, values[:, 0], values[:, 0] - 1))


def test_padding_repeats_the_last_step_of_the_episode():
    buffer = filled_buffer(14, 14)
    values, at = all_windows(Windows(buffer, horizon=3, history=1, pad=True, gamma=0.9))
    assert len(values) == 14
    assert values[5].tolist() == [5, 6, 6] and values[6].tolist() == [6, 6, 6] and values[7].tolist() == [7, 8, 9]
    assert at.padded[5].tolist() == [False, False, True] and not at.padded[7].any()


def test_windows_with_a_stride_hold_every_nth_step():
    buffer = filled_buffer(14, 14)
    values, _ = all_windows(Windows(buffer, horizon=3, history=1, pad=False, gamma=0.9, stride=2))
    assert values.tolist() == [[0, 2, 4], [1, 3, 5], [2, 4, 6], [7, 9, 11], [8, 10, 12], [9, 11, 13]]
    values, at = all_windows(Windows(buffer, horizon=3, history=1, pad=True, gamma=0.9, stride=2))
    assert len(values) == 14 and values[3].tolist() == [3, 5, 6] and at.padded[3].tolist() == [False, False, True]
    with pytest.raises(DatasetError, match=r"9 steps.*horizon=5, stride=2.*has 7"):
        Windows(buffer, horizon=5, history=1, pad=False, gamma=0.9, stride=2)


def test_short_episodes_need_padding():
    buffer = filled_buffer(14, 14)
    with pytest.raises(DatasetError, match=r"horizon=8.*has 7.*pad=True"):
        Windows(buffer, horizon=8, history=1, pad=False, gamma=0.9)
    assert len(Windows(buffer, horizon=8, history=1, pad=True, gamma=0.9)) == 14


def test_windows_of_weighted_datasets():
    buffer = filled_buffer(28, 28)
    windows = Windows(buffer, horizon=7, history=1, pad=False, gamma=0.9)
    np.random.seed(0)
    at = windows.sample(2000, [Segment(0, 14, 0.9), Segment(14, 28, 0.1)])
    assert set(at.rows[:, 0].tolist()) == {0, 7, 14, 21}
    assert (at.rows[:, 0] < 14).mean() == pytest.approx(0.9, abs=0.03)
    with pytest.raises(DatasetError, match="pad=True"):
        windows.sample(5, [Segment(0, 14, 0.5), Segment(22, 28, 0.5)])


def test_goal_changes_end_windows():
    vector = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    space = spaces.Dict({"observation": vector, "desired_goal": vector})
    buffer = DictReplayBuffer(10, space, spaces.Box(-1, 1, (1,)), "cpu")
    for t in range(10):
        obs = {"observation": np.full((1, 2), t), "desired_goal": np.full((1, 2), t // 4)}
        buffer.add(obs, obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
    assert Windows(buffer, 4, 1, False, 0.9, "desired_goal").starts[:, 0].tolist() == [0, 4]
    assert len(Windows(buffer, 4, 1, False, 0.9)) == 7


def test_returns_stop_at_the_ends():
    rewards, ends = np.ones((5, 2)), np.zeros((5, 2), bool)
    ends[1, 0] = ends[4] = True
    returns = discounted_returns(rewards, ends, 0.5)
    np.testing.assert_allclose(returns[:, 0], [1.5, 1, 1.75, 1.5, 1])
    np.testing.assert_allclose(returns[:, 1], [1.9375, 1.875, 1.75, 1.5, 1])


# --- the algorithm


def make(env=None, arrays=None, **kwargs):
    model = RACTD("MlpPolicy", env or box_env(), **{**SMALL, **kwargs})
    model.load_dataset(make_arrays() if arrays is None else arrays)
    return model


OBS = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)


def test_thirty_steps_visit_all_stages():
    model = make()
    stages = []
    model.losses, losses = lambda: stages.append(model.stage) or losses(), model.losses
    model.learn(30)
    assert stages == 12 * ["teacher"] + 3 * ["reward"] + 15 * ["student"]
    assert model.num_timesteps == 30 and model.plan(OBS).shape == (5, 16, 1)


def test_a_stage_trains_its_own_networks_only():
    model = make(teacher_steps=4, reward_steps=4)
    names = model.policy.network_names()

    def snapshot():
        return {n: [p.clone() for p in getattr(model.policy, n).parameters()] for n in names}

    def changed(before, after):
        return {n for n in names if any(not th.equal(a, b) for a, b in zip(before[n], after[n], strict=True))}

    expected = [{"teacher_model", "teacher_ema"}, {"reward_model"}, {"student"}]
    states = [snapshot()]
    for _ in range(3):
        model.pretrain(4)
        states.append(snapshot())
    assert [changed(a, b) for a, b in pairwise(states)] == expected


def test_only_the_network_of_the_stage_is_in_training_mode():
    model = make(teacher_steps=4, reward_steps=4)
    modes = []
    model.losses, losses = lambda: modes.append(in_training()) or losses(), model.losses

    def in_training():
        return [name for name in model.policy.network_names() if getattr(model.policy, name).training]

    model.pretrain(12)
    assert modes == 4 * [["teacher_model"]] + 4 * [["reward_model"]] + 4 * [["student"]]
    model.predict(OBS)
    assert in_training() == []


@pytest.mark.parametrize("support", [0.0, 10.0])
def test_rewards_fall_off_the_data(support):
    """Where all returns and all actions are equal, R sees nothing but the distance from them."""
    arrays = make_arrays()
    arrays["actions"][:], arrays["rewards"][:] = 0, 0
    model = make(arrays=arrays, teacher_steps=1, reward_steps=1500, reward_support=support).pretrain(1501)
    batch = next(model.batches(1, 500))
    judge = model.policy.reward_model
    with th.no_grad():
        on, off = (judge(batch.conditions, batch.plans + move).mean() for move in (0, 0.4))
    assert on - off == pytest.approx(1 - np.exp(-support * 0.4**2), abs=0.15)


@pytest.mark.parametrize(("steps", "stage"), [(0, "teacher"), (3, "teacher"), (4, "reward")])
def test_before_its_student_stage_a_planner_does_not_act(steps, stage):
    model = make(teacher_steps=4, reward_steps=2)
    model.pretrain(steps)
    for method in (model.predict, model.plan):
        with pytest.raises(RuntimeError, match=f"its {stage} stage.*{steps} gradient steps.*teacher_plan"):
            method(OBS)
    assert model.teacher_plan(OBS, steps=3).shape == (5, 16, 1)
    model.pretrain(6 - steps)
    # warm-started, not yet trained: one step from pure noise is the teacher's estimate there
    assert model.stage == "student" and model.predict(OBS)[0].shape == (5, 1)


def test_acting_with_the_teacher_or_more_jumps():
    model = make(teacher_steps=4, reward_steps=2)
    model.pretrain(3)
    with model.planning_with("teacher", 3):
        assert model.can_act
        action = model.predict(OBS, deterministic=True)[0]
        with pytest.raises(RuntimeError, match="teacher stage"):
            model.plan(OBS)
    assert not model.can_act
    np.testing.assert_array_equal(action, model.teacher_plan(OBS, steps=3, deterministic=True)[:, 0])
    model.pretrain(6)
    one = model.predict(OBS, deterministic=True)[0]
    with model.planning_with("student", 2):
        two = model.predict(OBS, deterministic=True)[0]
    np.testing.assert_array_equal(two, model.plan(OBS, deterministic=True, steps=2)[:, 0])
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(one, model.predict(OBS, deterministic=True)[0])
    with pytest.raises(ValueError, match=r"steps must be .*got 0"):
        model.plan(OBS, steps=0)
    with pytest.raises(ValueError, match="'student' or 'teacher', got 'reward'"), model.planning_with("reward"):
        pass


def test_deterministic_plans_take_no_fresh_noise():
    model = make(teacher_steps=1, reward_steps=1).pretrain(3)
    student = model.policy.student.model
    plans, samples = [], []
    for student.ctm_gamma in (0.0, 1.0):
        plans.append(model.plan(OBS, deterministic=True, steps=4))
        th.manual_seed(0)
        samples.append(model.plan(OBS, steps=4))
    np.testing.assert_array_equal(*plans)
    assert not np.allclose(*samples)


def test_student_starts_as_the_teacher_and_the_teacher_is_frozen():
    model = make(teacher_steps=4, reward_steps=1)
    model.pretrain(5)
    model.predict(OBS)
    cond = model.policy.student.condition(model.policy.conditions(th.as_tensor(OBS)[:, None]))
    x, t = th.randn(5, 16, 1), th.full((5,), 3.0)
    student, teacher = model.policy.student.model, model.policy.teacher_model.model
    assert th.allclose(student.scaled_network(x, cond, t, t / 2), teacher(x, t, cond), atol=1e-6)


@pytest.mark.parametrize("at", [5, 13, 20])
def test_resuming_inside_a_stage_changes_nothing(at, tmp_path):
    arrays = make_arrays()
    whole = make(arrays=arrays, policy_kwargs={"net_arch": [16, 16], "dropout": 0.1})
    whole.pretrain(30, callback=CheckpointCallback(at, str(tmp_path)))
    resumed = RACTD.load(tmp_path / f"rl_model_{at}_steps.zip", env=box_env())
    resumed.load_dataset(arrays)
    assert resumed.stage_ends() == (12, 15) and resumed._n_updates == at
    again = RACTD.load(tmp_path / f"rl_model_{at}_steps.zip", env=box_env())
    again.load_dataset(arrays)
    for model in (resumed, again):
        model.set_random_seed(3)
        model.pretrain(30 - at)
    assert_same(resumed, again)
    rates = [
        getattr(m.policy, n).optimizer.param_groups[0]["lr"] for m in (whole, resumed) for n in m.policy.trained_networks()
    ]
    assert rates[:3] == pytest.approx(rates[3:])
    steps = [
        next(iter(getattr(resumed.policy, n).optimizer.state.values()))["step"] for n in resumed.policy.trained_networks()
    ]
    assert [int(s) for s in steps] == [12, 15, 3]


def test_learning_rate_rises_and_falls_in_every_stage():
    model = make(teacher_steps=100, reward_steps=100, curriculum_steps=300, batch_size=2, learning_rate=1.0, warmup_steps=10)
    model.pretrain(0)  # sets up the logger
    model.in_offline_phase = True  # as it is inside pretrain()
    rates = []
    for step in range(300):
        model._n_updates = step
        model.update_learning_rates()
        rates.append(getattr(model.policy, next(iter(model.losses()))).optimizer.param_groups[0]["lr"])
    for start in (0, 100, 200):
        stage = rates[start : start + 100]
        assert stage[0] == pytest.approx(1 / 11) and max(stage) > 0.95 and stage[-1] < 1e-3


@pytest.mark.parametrize(
    ("lengths", "n_planned", "calls"),
    [((100, 50), 150, (150, 100)), ((0.4, 0.1), 50, (50, 100)), ((20, 10), 80, (80, 100)), ((20, 10), 80, (60, 120))],
)
def test_learning_rate_rises_and_falls_in_calls_beyond_the_plan(lengths, n_planned, calls):
    options = {"batch_size": 2, "learning_rate": 1.0, "warmup_steps": 10, "curriculum_steps": n_planned}
    model = make(teacher_steps=lengths[0], reward_steps=lengths[1], **options)
    rates = []

    def record(*_):
        rates.append(getattr(model.policy, next(iter(model.losses()))).optimizer.param_groups[0]["lr"])
        return True

    for n_steps in calls:
        model.pretrain(n_steps, callback=record)
    beyond = rates[n_planned:]
    assert beyond[0] == pytest.approx(1 / 11) and np.argmax(beyond) == 10 and beyond[-1] < 1e-3
    assert (np.diff(beyond[10:]) < 0).all()


def test_one_teacher_for_many_students(tmp_path):
    make(teacher_steps=6, reward_steps=1).pretrain(6).save(tmp_path / "teacher")
    path = str(tmp_path / "teacher.zip")
    source = RACTD.load(path)
    student = make(teacher=path, reward_steps=0.7)  # the default of teacher_steps and this are more than the run
    assert student.stage == "reward"
    for name in ("teacher_model", "teacher_ema"):
        ours, theirs = (getattr(m.policy, name).state_dict() for m in (student, source))
        assert all(th.equal(ours[key], theirs[key]) for key in theirs)
    np.testing.assert_array_equal(
        student.teacher_plan(OBS, steps=5, deterministic=True), source.teacher_plan(OBS, steps=5, deterministic=True)
    )
    student.pretrain(10)
    assert student.stage_ends() == (0, 7) and student.teacher == path
    student.save(tmp_path / "student")
    assert_same(student, RACTD.load(tmp_path / "student"))
    (tmp_path / "teacher.zip").unlink()
    RACTD.load(tmp_path / "student").predict(OBS)  # the file is no longer needed
    with pytest.raises((ValueError, FileNotFoundError)):
        make(teacher=path)


def test_a_teacher_that_was_saved_before_there_was_a_stride(tmp_path):
    old = make(teacher_steps=6).pretrain(2)
    del old.stride
    old.save(tmp_path / "teacher")
    assert make(teacher=str(tmp_path / "teacher")).stride == 1


def test_a_teacher_must_fit(tmp_path):
    make(teacher_steps=6).pretrain(2).save(tmp_path / "teacher")
    path = str(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher: .*horizon=16.*8"):
        make(teacher=path, horizon=8)
    with pytest.raises(ValueError, match=r"teacher: .*teacher_ema.model.network"):
        make(teacher=path, policy_kwargs={"net_arch": [16]})
    # weights of the same shapes, but another function
    for kwargs, told in [
        ({"activation_fn": nn.ReLU}, r"Mish\(\), this model has .*ReLU\(\)"),
        ({"model_kwargs": {"sigma_data": 0.1}}, r"sigma_data=0.5, this model has .*sigma_data=0.1"),
        ({"model_kwargs": {"sigma_max": 20.0}}, r"sigma_max=80.0, .*sigma_max=20.0"),
        ({"model_kwargs": {"network_kwargs": {"embedding_scale": 5.0}}}, r"scale=1.0, this model has scale=5.0"),
    ]:
        with pytest.raises(ValueError, match=f"teacher: .*teacher was trained with .*{told}"):
            make(teacher=path, policy_kwargs={**SMALL["policy_kwargs"], **kwargs})
    CPQL("MlpPolicy", box_env(), **SMALL).save(tmp_path / "cpql")
    with pytest.raises(ValueError, match=r"teacher: .*cpql.zip: This is a model of another algorithm.*Pass a file of RACTD"):
        make(teacher=str(tmp_path / "cpql.zip"))
    with pytest.raises(FileNotFoundError, match=r"^teacher: .*nope.zip: there is no such file"):
        make(teacher=str(tmp_path / "nope.zip"))


def test_a_loaded_model_keeps_its_teacher(tmp_path):
    make(teacher_steps=6).pretrain(2).save(tmp_path / "teacher")
    path, own = str(tmp_path / "teacher"), str(tmp_path / "model")
    make(teacher=path).save(own)
    for name, other in ((path, own), (path, "nope.zip"), (own, None)):
        with pytest.raises(ValueError, match=r"teacher: load\(\) takes no other teacher"):
            RACTD.load(name, teacher=other)
    assert RACTD.load(own, teacher=path).stage == "reward" and RACTD.load(path, teacher=None).stage == "teacher"


def test_taking_a_teacher_draws_the_models_own_random_numbers(tmp_path):
    make(teacher_steps=6, seed=5).pretrain(2).save(tmp_path / "teacher")
    drawn = [(make(teacher=str(tmp_path / "teacher"), seed=seed), th.rand(1))[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


OPTIONS = [
    {"reward_input": "denoised", "reward_horizon": 16},
    {"reward_weight": 0.0, "reward_steps": 0},
    {"distill_from": "ema", "alpha": 0.5, "beta": 2.0},
    {"sampling_steps": 4},
    {"pad": False, "horizon": 8},
    {"history": 3, "executed_steps": 4},
    {"cosine_lr_decay": False, "warmup_steps": 0, "actor_learning_rate": 1e-4, "max_grad_norm": 1.0},
    {"policy_kwargs": {"network": "unet", "net_arch": [16, 32, 48], "dropout": 0.2}},
    {"policy_kwargs": {"net_arch": {"pi": [16], "qf": [8]}, "activation_fn": nn.ReLU, "optimizer_class": th.optim.Adam}},
    {"policy_kwargs": {"model_kwargs": {"metric": "pseudo_huber_squared", "initial_noise_scale": 1.0, "n_levels": 20}}},
    {"policy_kwargs": {"student_kwargs": {"ctm_gamma": 0.0, "dsm_target": "denoiser"}}, "sampling_steps": 2},
]


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_every_option_trains_and_survives_saving(kwargs, tmp_path):
    model = make(**kwargs).pretrain(8)
    model.save(tmp_path / "model")
    loaded = RACTD.load(tmp_path / "model")
    assert_same(model, loaded)
    assert all(th.isfinite(p).all() for p in model.policy.parameters())
    assert len(model.plan(OBS)[0]) == model.horizon


@pytest.mark.parametrize(
    "kwargs",
    [
        {"plan_of": "x"},
        {"horizon": 0},
        {"history": 0},
        {"stride": 0},
        {"stride": 2},
        {"executed_steps": 17},
        {"executed_steps": 0},
        {"teacher_steps": 1.5},
        {"reward_steps": -1},
        {"teacher_steps": 0.9, "reward_steps": 0.1},
        {"warmup_steps": -1},
        {"alpha": -1},
        {"reward_weight": -0.5},
        {"reward_input": "x"},
        {"reward_horizon": 17},
        {"distill_from": "x"},
        {"n_steps": 3},
        {"replay_buffer_class": HerReplayBuffer},
        {"sampling_steps": 0},
        {"plan_of": "states"},
    ],
)
def test_bad_hyperparameters_name_themselves(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        RACTD("MlpPolicy", box_env(), **SMALL, **kwargs)


def test_a_student_has_its_teachers_network():
    policy_kwargs = {"net_arch": [8, 8], "activation_fn": nn.SiLU, "student_kwargs": {"network_kwargs": {"dropout": 0.1}}}
    model = make(policy_kwargs=policy_kwargs, teacher_steps=1, reward_steps=1).pretrain(4)
    teacher, student = (n.model.network.layers for n in (model.policy.teacher_model, model.policy.student))
    assert [type(layer) for layer in teacher] == [type(layer) for layer in student]
    assert [layer.p for layer in student if isinstance(layer, nn.Dropout)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"sigma_min": 0.002}, r"student_kwargs'\]: sigma_min must be the teacher's.*0.002; pass it .*model_kwargs"),
        ({"network_kwargs": {"net_arch": [4]}}, r"net_arch must be the teacher's.*\[4\]; pass it in .*model_kwargs"),
    ],
)
def test_a_student_is_not_of_other_maths_than_its_teacher(kwargs, told):
    with pytest.raises(ValueError, match=told):
        make(policy_kwargs={**SMALL["policy_kwargs"], "student_kwargs": kwargs})
    make(policy_kwargs={**SMALL["policy_kwargs"], "student_kwargs": kwargs, "model_kwargs": kwargs})


def test_network_options_of_before_still_load(tmp_path):
    model = make()
    odd = {"model_kwargs": {"network": "unet"}, "student_kwargs": {"sigma_min": 0.002}}
    model.policy_kwargs = {**model.policy_kwargs, **odd}
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model.safe")
    for loaded in (RACTD.load(tmp_path / "model"), RACTD.load_safe(tmp_path / "model.safe")):
        assert loaded.policy.student.model.sigma_min == 0.002
        assert isinstance(loaded.policy.student.model.network, TemporalMlp)


@pytest.mark.parametrize("low_high", [(-1, 1), (5, 7)])
def test_plans_lie_in_the_action_space(low_high):
    space = spaces.Box(*low_high, (2, 2), np.float32)
    arrays = {**make_arrays(action_dim=4), "action_space": space}
    arrays["actions"] = arrays["actions"].reshape(-1, 2, 2) * (low_high[1] - low_high[0]) / 2 + sum(low_high) / 2
    model = make(VectorEnv(action_space=space), arrays).pretrain(5)
    plans = [model.plan(OBS), model.teacher_plan(OBS, steps=2), model.plan(OBS, steps=2)]
    assert all(p.shape == (5, 16, 2, 2) and space.contains(p.reshape(-1, 2, 2)[i]) for p in plans for i in range(80))
    assert model.plan(OBS[0]).shape == (16, 2, 2) and model.predict(OBS[0])[0].shape == (2, 2)
    first = model.plan(OBS, deterministic=True)[:, 0]
    np.testing.assert_allclose(model.predict(OBS, deterministic=True)[0], first, rtol=1e-5)


def test_executing_several_steps_of_a_plan():
    model = make(executed_steps=3).pretrain(5)
    plans, state = [], None
    rng = np.random.default_rng(0)
    for step in range(6):
        obs = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
        if step % 3 == 0:
            plans.append(model.plan(obs, deterministic=True))
        action, state = model.predict(obs, state, np.zeros(2, bool), deterministic=True)
        np.testing.assert_allclose(action, plans[-1][:, step % 3], atol=1e-6)
    # a new episode replans, alone
    obs = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
    _, state = model.predict(obs, state, np.zeros(2, bool), deterministic=True)
    action, _ = model.predict(obs, state, np.array([False, True]), deterministic=True)
    fresh = model.plan(obs, deterministic=True)
    np.testing.assert_allclose(action, np.stack([fresh[0, 1], fresh[1, 0]]), atol=1e-6)


def test_what_predict_is_given_must_be_of_the_same_environments():
    model = make(history=2).pretrain(5)
    with model.planning_with("teacher"):
        with pytest.raises(ValueError, match=r"first entry, as in obs, info = env\.reset"):
            model.predict(box_env().reset())
        state = model.predict(np.zeros((3, 3)))[1]
        with pytest.raises(ValueError, match="state is of 3 environment"):
            model.predict(np.zeros((2, 3)), state)
        with pytest.raises(ValueError, match="episode_start is of 1 environment"):
            model.predict(np.zeros((3, 3)), state, np.array([False]))


def test_history_shifts_and_starts_anew():
    model = make(history=2).pretrain(5)
    one, two = OBS[:2], OBS[2:4]
    _, state = model.predict(one)
    _, state = model.predict(two, state, np.array([False, True]))
    np.testing.assert_array_equal(state.history[0], np.stack([one[0], two[0]]))
    np.testing.assert_array_equal(state.history[1], np.stack([two[1], two[1]]))
    mean, _ = evaluate_policy(model, make_vec_env(box_env, n_envs=2), n_eval_episodes=2)
    assert np.isfinite(mean)


def test_several_environments_and_vec_normalize():
    env = VecNormalize(make_vec_env(box_env, n_envs=2))
    model = RACTD("MlpPolicy", env, **SMALL)
    model.load_dataset(make_arrays())
    model.pretrain(5)
    batch = next(model.batches(1, 64))
    assert batch.conditions.shape == (64, 1, 3) and batch.conditions.abs().max() < 10  # normalised: raw ones reach 5000
    assert evaluate_policy(model, env, n_eval_episodes=2)[0] < 0


def test_heldout_loss_is_of_windows_that_training_does_not_see():
    model = RACTD("MlpPolicy", box_env(), **SMALL)
    model.load_dataset(make_arrays(), heldout_fraction=0.34)
    assert len(model.data.windows()) == 80 and len(model.data.heldout["windows"]) == 40
    model.pretrain(20)
    assert model.data.heldout_loss() == model.data.heldout_loss() > 0


def test_held_out_episodes_have_windows_for_every_environment():
    model = RACTD("MlpPolicy", make_vec_env(box_env, n_envs=8), **SMALL)
    arrays = make_arrays(n_episodes=4, length=3)
    with pytest.raises(DatasetError, match=r"heldout_fraction: .* 3 transition\(s\).*environments \(8\)"):
        model.load_dataset(arrays, heldout_fraction=0.25)
    assert model.replay_buffer.size() == 0  # nothing has changed


def test_observations_and_returns_are_scaled_to_the_unit_box():
    model = make()
    batch = next(model.batches(1, 2000))
    cond = model.policy.student.condition(batch.conditions)
    assert cond.min().item() == pytest.approx(-1, abs=0.01) and cond.max().item() == pytest.approx(1, abs=0.01)
    assert batch.returns.min().item() == pytest.approx(-1, abs=0.01) and batch.returns.max().item() == pytest.approx(
        1, abs=0.01
    )
    assert batch.plans.abs().max() <= 1 and batch.plans.shape == (2000, 16, 1)


def test_returns_are_scaled_anew_until_the_reward_stage_has_begun(tmp_path):
    def scaled_returns(model, arrays):
        model.load_dataset(arrays)
        returns = next(model.batches(1, 2000)).returns
        return returns.min().item(), returns.max().item()

    arrays, larger = make_arrays(), make_arrays()
    larger["rewards"] *= 10
    model = make(arrays=arrays, teacher_steps=2, reward_steps=2).pretrain(1)
    model.save(tmp_path / "model")
    assert scaled_returns(model, larger) == pytest.approx((-1, 1), abs=0.01)
    assert scaled_returns(RACTD.load(tmp_path / "model", gamma=0.5), arrays) == pytest.approx((-1, 1), abs=0.01)
    assert scaled_returns(model.pretrain(1), arrays) == pytest.approx((-1, 1), abs=0.01)
    assert scaled_returns(model.pretrain(1), larger)[1] > 10  # what R has begun to learn keeps its scale


# --- plans of states


class PointEnv(gym.Env):
    """A point with inertia that is to reach one goal after the other."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict(
        {"observation": spaces.Box(-np.inf, np.inf, (4,)), "desired_goal": spaces.Box(-np.inf, np.inf, (2,))}
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.goal, self.t = np.zeros(4), self.np_random.uniform(-1, 1, 2), 0
        return self.observe(), {}

    def observe(self):
        return {"observation": self.state.astype(np.float32), "desired_goal": self.goal.astype(np.float32)}

    def step(self, action):
        self.t += 1
        self.state[2:] = 0.9 * self.state[2:] + 0.1 * action
        self.state[:2] += self.state[2:]
        reached = np.linalg.norm(self.state[:2] - self.goal) < 0.1
        if reached:
            self.goal = self.np_random.uniform(-1, 1, 2)
        return self.observe(), float(reached), False, self.t >= 100, {}


def point_data(n_steps=400):
    env, rows = PointEnv(), []
    obs, _ = env.reset(seed=0)
    for _ in range(n_steps):
        action = np.clip(3 * (obs["desired_goal"] - obs["observation"][:2]) - 6 * obs["observation"][2:], -1, 1)
        after, reward, _, end, _ = env.step(action)
        rows.append((obs, action, reward, after, False, end))
        obs = env.reset()[0] if end else after
    keys = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    arrays = dict(zip(keys, zip(*rows, strict=True), strict=True))
    for key in ("observations", "next_observations"):
        arrays[key] = {k: np.stack([o[k] for o in arrays[key]]) for k in ("observation", "desired_goal")}
    return {key: value if isinstance(value, dict) else np.array(value) for key, value in arrays.items()}


@pytest.fixture(scope="module")
def pointer():
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", horizon=16, **SMALL)
    model.load_dataset(point_data())
    return model.pretrain(10)


def test_rewards_are_capped_at_the_best_of_the_data(pointer):
    stacked = th.zeros(2, 4)[None].expand(5, -1, -1)
    for model, plans, expected in [(pointer, th.zeros(5, 16, 4), 16), (make(), th.zeros(5, 16, 1), 1)]:
        network = copy.deepcopy(model.policy.reward_model)
        nn.init.zeros_(network.value_net.layers[-1].weight)
        nn.init.constant_(network.value_net.layers[-1].bias, 3.0)
        observations = stacked if expected == 16 else th.zeros(5, 1, 3)
        assert network(observations, plans).tolist() == 5 * [expected]
        assert network.judge(network.condition(observations), plans).tolist() == 5 * [3 * expected]


def test_rewards_of_states_fall_off_the_data():
    arrays = point_data()
    arrays["rewards"][:] = 0
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", horizon=16, teacher_steps=1, reward_steps=1500, **SMALL)
    model.load_dataset(arrays)
    model.pretrain(1501)
    batch = next(model.batches(1, 500))
    with th.no_grad():
        on, off = (
            model.policy.reward_model(batch.reward_conditions, s).mean() for s in (batch.plans[:, :1], 3 * th.ones(500, 1, 4))
        )
    assert on - off > 0.6  # of 1: that state is at least 2 away from all others, in every dimension


def test_plans_of_states_are_learned_at_higher_noise_levels(pointer):
    for network in (pointer.policy.teacher_model, pointer.policy.student):
        assert (network.model.p_mean, network.model.p_std) == (0.0, 1.6)
    assert make().policy.student.model.p_mean == -1.2
    policy_kwargs = {**SMALL["policy_kwargs"], "model_kwargs": {"p_mean": -1.0}}
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", **{**SMALL, "policy_kwargs": policy_kwargs})
    assert (model.policy.teacher_model.model.p_mean, model.policy.teacher_model.model.p_std) == (-1.0, 1.6)


def test_windows_of_states_end_in_their_condition(pointer):
    batch = next(pointer.batches(1, 500))
    normalise = pointer.policy.student.obs_normalizer
    assert batch.plans.shape == (500, 16, 4) and batch.plans.abs().max() <= 1 + 1e-5
    assert th.allclose(normalise(batch.conditions)[:, 0], batch.plans[:, 0])
    assert th.allclose(normalise(batch.conditions)[:, 1], batch.plans[:, -1])
    # what waits at the end of a trajectory is at rest
    padded = (batch.plans[:, -1, :2] == batch.plans[:, -2, :2]).all(dim=1)
    assert padded.any() and (batch.conditions[padded, 1, 2:] == 0).all()
    # the reward model is told the goal of the environment
    assert batch.reward_conditions.shape == (500, 2, 4) and (batch.reward_conditions[:, 1, 2:] == 0).all()


def test_rewards_of_states_know_goals_at_rest_only(pointer):
    batch = next(pointer.batches(1, 500))
    moving, at_rest = batch.conditions.clone(), batch.conditions.clone()
    moving[:, 1, 2:], at_rest[:, 1, 2:] = 0.5, 0
    student, reward_model = pointer.policy.student, pointer.policy.reward_model
    assert not th.equal(student.condition(moving), student.condition(at_rest))
    assert th.equal(reward_model(moving, batch.plans), reward_model(at_rest, batch.plans))


@pytest.mark.parametrize(("executed_steps", "age"), [(None, 5), (5, 0), (100, 20)])
def test_a_plan_of_states_is_renewed_when_it_is_over(executed_steps, age, tmp_path):
    options = {"plan_of": "states", "horizon": 16, "executed_steps": executed_steps, "teacher_steps": 0, "reward_steps": 0}
    model = RACTD("MultiInputPolicy", PointEnv(), **options, **SMALL)
    model.load_dataset(point_data())
    model.pretrain(1).save(tmp_path / "model")
    model = RACTD.load(tmp_path / "model")
    obs, _ = PointEnv().reset(seed=3)
    _, state = model.predict(obs)
    first = state.plan
    for _ in range(20):
        _, state = model.predict(obs, state, np.array([False]))
    assert state.age.tolist() == [age]  # a plan of 16 states has 15 moves; more of them hold its end
    assert th.equal(state.plan, first) == (executed_steps == 100)


def test_between_planned_states_lies_the_line_that_joins_them():
    plans = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    for steps, expected in [
        ([0, 3], [plans[0, 0], plans[1, 1]]),
        ([1, 5], [plans[0, 0] + 4 / 3, plans[1, 1] + 8 / 3]),
        ([6, 7], [plans[0, 2], [*plans[1, 2, :2], 0, 0]]),  # the end, and at rest beyond it
    ]:
        np.testing.assert_allclose(planned_states(plans, np.array(steps), 3), expected, rtol=1e-6)
    np.testing.assert_allclose(forces(plans[:1, 0], plans[:1, 1], (2.0, 0.5)), [[10, 10]])


def test_plans_with_a_stride_reach_further(tmp_path):
    options = {"plan_of": "states", "horizon": 8, "stride": 3, "teacher_steps": 1, "reward_steps": 1}
    model = RACTD("MultiInputPolicy", PointEnv(), **options, **SMALL)
    model.load_dataset(point_data())
    windows = model.pretrain(3).data.windows()
    at = windows.at(windows.starts[:500])
    inside = ~at.padded.any(axis=1)
    np.testing.assert_array_equal(at.rows[inside], at.rows[inside, :1] + 3 * np.arange(8))
    states = th.as_tensor(model.replay_buffer.observations["observation"][at.rows, at.columns])[inside]
    batch = model.data._plan_batch(windows, at)
    assert th.allclose(batch.plans[inside], model.policy.student.obs_normalizer(states))
    assert th.allclose(batch.conditions[inside], states[:, [0, -1]])
    model.save(tmp_path / "model")
    loaded, (obs, _) = RACTD.load(tmp_path / "model"), PointEnv().reset(seed=3)
    plan = loaded.plan(obs, deterministic=True)
    action, state = loaded.predict(obs, deterministic=True)
    target = plan[0] + (plan[1] - plan[0]) / 3
    expected = (target - obs["observation"])[:2] + (target - obs["observation"])[2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)
    ages = []
    for _ in range(22):
        _, state = loaded.predict(obs, state, np.array([False]))
        ages.append(int(state.age[0]))
    assert ages == [*range(1, 21), 0, 1]  # 8 states are 7 moves of 3 steps
    with pytest.raises(ValueError, match="stride=3"):
        RACTD("MultiInputPolicy", PointEnv(), teacher=str(tmp_path / "model.zip"), **{**options, "stride": 2}, **SMALL)


def test_plans_of_states_are_tracked(pointer, tmp_path, monkeypatch):
    env = PointEnv()
    obs, _ = env.reset(seed=3)
    plan = pointer.plan(obs, deterministic=True)
    assert plan.shape == (16, 4) and pointer.teacher_plan(obs, steps=2).shape == (16, 4)
    action, state = pointer.predict(obs, deterministic=True)
    expected = plan[1, :2] - obs["observation"][:2] + plan[1, 2:] - obs["observation"][2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)
    for _ in range(14):
        obs = {**obs, "observation": obs["observation"] + 0.01}
        action, state = pointer.predict(obs, state, np.array([False]), deterministic=True)
    assert state.age.tolist() == [14]  # one plan, to its last state
    expected = plan[-1, :2] - obs["observation"][:2] + plan[-1, 2:] - obs["observation"][2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)
    pointer.executed_steps = 100
    action, state = pointer.predict(obs, state, np.array([False]), deterministic=True)
    expected = plan[-1, :2] - obs["observation"][:2] - obs["observation"][2:]
    np.testing.assert_allclose(action, np.clip(expected, -1, 1), atol=1e-5)  # held at rest
    obs = {**obs, "desired_goal": obs["desired_goal"] + 0.5}
    _, state = pointer.predict(obs, state, np.array([False]), deterministic=True)
    assert state.age.tolist() == [0]  # a new goal, a new plan
    pointer.save(tmp_path / "model")
    loaded = RACTD.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], pointer.predict(obs, deterministic=True)[0])
    assert np.isfinite(evaluate_policy(pointer, make_vec_env(PointEnv, n_envs=2), n_eval_episodes=2)[0])


def test_uncut_windows_of_states():
    model = RACTD("MultiInputPolicy", PointEnv(), plan_of="states", horizon=16, cut_at_goals=False, pad=False, **SMALL)
    model.load_dataset(point_data())
    assert len(model.data.windows()) == 400 - 4 * 15
    model.pretrain(6)


def test_plans_of_states_need_states():
    with pytest.raises(ValueError, match=r"plan_of='states'.*desired_goal"):
        RACTD("MlpPolicy", box_env(), plan_of="states", **SMALL)
    with pytest.raises(ValueError, match="normalize_observations"):
        RACTD("MultiInputPolicy", PointEnv(), plan_of="states", normalize_observations=False, **SMALL)
    with pytest.raises(ValueError, match="history"):
        RACTD("MultiInputPolicy", PointEnv(), plan_of="states", history=2, **SMALL)


def test_evaluations_wait_for_the_student(tmp_path):
    model = RACTD("MlpPolicy", box_env(), dataset=make_arrays(), **SMALL)
    evaluation = EvalCallback(box_env(), n_eval_episodes=1, eval_freq=5, log_path=str(tmp_path), verbose=0)
    model.pretrain(20, callback=[evaluation])  # teacher 8, reward model 2
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [10, 15, 20]


def test_an_evaluation_asks_the_model_that_it_is_given_to():
    class Note(BaseCallback):
        def _on_step(self):
            evaluated.append(self.model)
            return True

    evaluated = []
    evaluation = EvalCallback(box_env(), callback_after_eval=Note(), n_eval_episodes=1, eval_freq=1, verbose=0)
    waiting, acting = make(teacher_steps=50), make(teacher_steps=0, reward_steps=0)
    for model in (waiting, acting, waiting, acting):
        model.pretrain(2, callback=evaluation)
    assert evaluated == 4 * [acting]
    assert evaluation._on_step.args[1].__func__ is EvalCallback._on_step  # not wrapped anew by every call
