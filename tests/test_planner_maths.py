"""RACTD's teacher and student against closed forms."""

import math
from itertools import pairwise

import pytest
import torch as th
from torch import nn

from sb3_consistency.generative.consistency import boundary_scalings
from sb3_consistency.generative.edm import EDMModel, heun_step, window_distance
from sb3_consistency.generative.schedules import karras_sigma
from sb3_consistency.generative.temporal import (
    coloured_noise,
    cosine_transform,
    make_temporal_network,
)
from sb3_consistency.generative.trajectory import TrajectoryConsistencyModel

# data x0 ~ N(0, S^2), where the ODE's solution is x_s = x_t sqrt((S^2 + s^2) / (S^2 + t^2))


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


def test_student_needs_a_teacher():
    model = exact_student()
    x0, noise, u, cond = draws(2)
    with pytest.raises(ValueError, match="teacher"):
        model.loss(x0, cond, noise=noise, u=u)
    assert model.loss(x0, cond, noise=noise, u=u, target=exact_denoiser).shape == (2,)
