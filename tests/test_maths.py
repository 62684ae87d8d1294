"""The generative maths against closed forms."""

import math
from itertools import pairwise

import pytest
import torch as th
from torch import nn

from sb3_consistency.generative.consistency import ConsistencyModel, boundary_scalings, pseudo_huber, squared_error
from sb3_consistency.generative.model import clamp_action
from sb3_consistency.generative.networks import LnResnet, Mish, _MishFunction, make_network
from sb3_consistency.generative.schedules import (
    consistency_curriculum,
    doubling_curriculum,
    karras_level,
    karras_sigma,
    sampling_sigmas,
    truncated_log_normal,
)
from sb3_consistency.generative.temporal import ChunkUnet
from sb3_consistency.values.critics import StackedCritic, StackedMlp
from tests.conftest import FixedNetwork


def test_levels_ascend_from_sigma_min_to_sigma_max():
    sigmas = karras_sigma(th.arange(40), 40)
    assert sigmas[0] == pytest.approx(0.002, rel=1e-5) and sigmas[-1] == pytest.approx(80.0, rel=1e-5)
    assert (sigmas.diff() > 0).all()


def test_karras_level_inverts_karras_sigma():
    levels = th.arange(150, dtype=th.float64)
    assert th.allclose(karras_level(karras_sigma(levels, 150), 150), levels, atol=1e-6)


@pytest.mark.parametrize(("n_steps", "expected"), [(1, [80]), (2, [80, 2.52]), (5, [80, 24.4, 5.84, 0.965, 0.085])])
def test_sampling_levels(n_steps, expected):
    assert sampling_sigmas(n_steps) == pytest.approx(expected, rel=5e-3)


def test_sampling_needs_a_step():
    with pytest.raises(ValueError, match="n_steps"):
        sampling_sigmas(0)


def test_curricula_reach_their_ends():
    start, end = th.tensor(0.0), th.tensor(1.0)
    assert consistency_curriculum(start, 2, 150) == 2 and consistency_curriculum(end, 2, 150) == 150
    assert doubling_curriculum(start, 10, 1280) == 11 and doubling_curriculum(end, 10, 1280) == 1281
    # eight stages of equal length
    assert doubling_curriculum(th.tensor(0.126), 10, 1280) == 21


def test_truncated_log_normal_is_the_discretised_log_normal():
    n_levels, mean, std = 20, -1.1, 2.0
    u = (th.arange(200_000, dtype=th.float64) + 0.5) / 200_000
    sigma = truncated_log_normal(u, mean, std, 0.002, 80.0)
    levels = karras_level(sigma, n_levels).floor().long().clamp(max=n_levels - 2)
    counts = th.bincount(levels, minlength=n_levels - 1).double()
    grid = karras_sigma(th.arange(n_levels, dtype=th.float64), n_levels)
    weights = th.erf((grid.log() - mean) / (math.sqrt(2) * std)).diff()
    assert th.allclose(counts / 200_000, weights / weights.sum(), atol=1e-4)


@pytest.mark.parametrize("network", ["mlp", "ln_resnet"])
def test_identity_at_the_boundary(network):
    model = ConsistencyModel(3, 5, network=network).eval()
    x, cond = 100 * th.randn(16, 3), th.randn(16, 5)
    assert th.equal(model(x, th.full((16,), model.sigma_min), cond), x)


@pytest.mark.parametrize("network", ["mlp", "ln_resnet", "unet"])
@pytest.mark.parametrize("n_levels", [1, 3])
def test_network_at_fixed_levels_equals_the_network(network, n_levels):
    # the U-Net divides groups of few values by their deviation, which can be almost nothing: wider ones are no matter of luck
    kwargs = {"net_arch": [64, 64] if network == "unet" else [8, 8]}
    net = ChunkUnet(2, 1, 3, **kwargs) if network == "unet" else make_network(network, 2, 3, kwargs)
    net = net.double().eval()
    levels, cond = th.arange(n_levels, dtype=th.float64) - 0.7, th.randn(5, 3, dtype=th.float64)
    fixed = net.at_levels(tuple(levels.tolist()), cond)
    for i in range(n_levels):
        x = th.randn(5, 2, dtype=th.float64, requires_grad=True)
        plain, fast = net(0.3 * x, levels[i : i + 1], cond), fixed(x, i, 0.3)
        assert th.allclose(plain, fast, atol=1e-6)
        grads = [th.autograd.grad(y.sum(), [x, *net.parameters()], retain_graph=True) for y in (plain, fast)]
        assert all(th.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_one_step_sample_is_the_consistency_function_of_pure_noise():
    model = ConsistencyModel(2, 3).double()
    noise, cond = 0.1 * th.randn(1, 8, 2, dtype=th.float64), th.randn(8, 3, dtype=th.float64)
    expected = model(80 * noise[0], th.full((8,), 80.0, dtype=th.float64), cond).clamp(-1, 1)
    assert th.allclose(model.sample(noise, cond), expected)


def test_scalings_reject_matrices():
    with pytest.raises(ValueError, match="one-dimensional"):
        boundary_scalings(th.ones(3, 1))


def test_one_row_of_sigma_equals_many():
    model = ConsistencyModel(2, 3)
    x, cond = th.randn(8, 2), th.randn(8, 3)
    assert th.allclose(model(x, th.full((8,), 5.0), cond), model(x, th.full((1,), 5.0), cond), atol=1e-6)


class GaussianDenoiser(FixedNetwork):
    """
    Backbone for which the model equals x * gain(sigma): the exact consistency function or denoiser of N(0, s^2) data.

    F = (gain - c_skip) / (c_out c_in) * (c_in x).
    """

    def __init__(self, gain):
        super().__init__()
        self.gain = gain
        self.unused = nn.Parameter(th.zeros(1))

    def forward(self, scaled_x, log_sigma, cond):
        sigma = log_sigma.exp()
        c_skip, c_out, c_in = boundary_scalings(sigma)
        factor = th.where(c_out == 0, 0, (self.gain(sigma) - c_skip) / (c_out * c_in).clamp(min=1e-12))
        return factor.unsqueeze(-1) * scaled_x


def exact_gain(s, sigma_min=0.002):
    return lambda sigma: th.sqrt((s**2 + sigma_min**2) / (s**2 + sigma**2))


def test_exact_consistency_function_maps_noise_to_data():
    s = 0.3
    model = ConsistencyModel(1, 1).double()
    model.network = GaussianDenoiser(exact_gain(s))
    samples = model.sample(th.randn(1, 100_000, 1, dtype=th.float64), th.zeros(100_000, 1, dtype=th.float64))
    # clamping to [-1, 1] touches 0.1 % of N(0, 0.3)
    assert samples.std() == pytest.approx(s, rel=0.01)


def test_two_step_sampling_keeps_the_distribution():
    s = 0.3
    model = ConsistencyModel(1, 1, sampling_steps=2).double()
    model.network = GaussianDenoiser(exact_gain(s))
    noise = th.randn(model.noise_shape(100_000), dtype=th.float64)
    assert model.sample(noise, th.zeros(100_000, 1, dtype=th.float64)).std() == pytest.approx(s, rel=0.01)


def test_fixed_point_of_consistency_training_is_the_product_formula():
    """
    For data N(0, s^2) the recursion f(., n + 1) = E[f(x_n) | x_{n+1}] has the gain prod (s^2 + s_n s_{n+1}) / (s^2 +
    s_{n+1}^2): with that target, the loss is stationary exactly there.
    """
    s, n_levels = 0.4, 6
    grid = karras_sigma(th.arange(n_levels, dtype=th.float64), n_levels)
    gains = [th.ones((), dtype=th.float64)]
    for low, high in pairwise(grid):
        gains.append(gains[-1] * (s**2 + low * high) / (s**2 + high**2))
    table = th.stack(gains)

    def gain(sigma, shift):
        level = karras_level(sigma, n_levels).round().long()
        return th.where(level == 0, 1.0, table[level] + shift)

    x0 = s * th.randn(400_000, 1, dtype=th.float64)
    noise, cond = th.randn_like(x0), th.zeros_like(x0)
    u = th.full_like(x0, (n_levels - 2 + 0.5) / (n_levels - 1))  # always the highest pair of levels
    shift = th.zeros((), dtype=th.float64, requires_grad=True)
    model = ConsistencyModel(1, 1, bc_loss="consistency", curriculum=(n_levels, n_levels)).double()
    model.network = GaussianDenoiser(lambda sigma: gain(sigma, shift))
    target = ConsistencyModel(1, 1).double()
    target.network = GaussianDenoiser(lambda sigma: gain(sigma, 0.0))
    loss = model.loss(x0, cond, noise=noise, u=u, target=lambda x, sigma: target(x, sigma, cond)).mean()
    (slope,) = th.autograd.grad(loss, shift)
    curvature = 2 * (s**2 + grid[-1] ** 2)
    assert abs(slope / curvature) < 0.02 * table[-1]


def test_minimiser_of_reconstruction_is_the_conditional_mean():
    s = 0.4
    x0 = s * th.randn(400_000, 1, dtype=th.float64)
    noise, u, cond = th.randn_like(x0), th.rand_like(x0), th.zeros_like(x0)
    model = ConsistencyModel(1, 1, bc_loss="reconstruction").double()

    def loss(factor):
        model.network = GaussianDenoiser(lambda sigma: factor * s**2 / (s**2 + sigma**2))
        return model.loss(x0, cond, noise=noise, u=u).mean()

    best = loss(1.0)
    assert best < loss(0.97) and best < loss(1.03)


def test_consistency_loss_of_a_perfect_student_vanishes_as_the_grid_is_refined():
    x0 = 0.4 * th.randn(50_000, 1, dtype=th.float64)
    noise, u, cond = th.randn_like(x0), th.rand_like(x0), th.zeros_like(x0)
    losses = []
    for n_levels in (10, 20, 40):
        model = ConsistencyModel(1, 1, bc_loss="consistency", curriculum=(n_levels, n_levels)).double()
        model.network = GaussianDenoiser(exact_gain(0.4))
        losses.append(model.loss(x0, cond, noise=noise, u=u).mean().item())
    assert losses[0] > 2 * losses[1] > 4 * losses[2]


def test_targets_carry_no_gradient():
    model = ConsistencyModel(2, 3)
    x0, cond = th.randn(4, 2), th.randn(4, 3)
    kwargs = {"noise": th.randn(4, 2), "u": th.rand(4, 1)}
    through_itself = model.loss(x0, cond, **kwargs).sum()
    frozen = ConsistencyModel(2, 3)
    frozen.load_state_dict(model.state_dict())
    explicit = model.loss(x0, cond, target=lambda x, sigma: frozen(x, sigma, cond), **kwargs).sum()
    grads = [th.autograd.grad(loss, list(model.parameters())) for loss in (through_itself, explicit)]
    assert all(th.allclose(a, b) for a, b in zip(*grads, strict=True))


def test_distances():
    a, b = th.tensor([[1.0, 2.0]]), th.tensor([[1.0, 0.0]])
    assert squared_error(a, b) == 2.0  # mean over dimensions
    c = 0.00054 * math.sqrt(2)
    assert pseudo_huber(a, b) == pytest.approx(math.sqrt(4 + c**2) - c)
    assert pseudo_huber(a, a) == 0


def test_loss_scaling_is_the_stated_weight():
    options = {"bc_loss": "consistency", "curriculum": (2, 2)}
    plain, scaled = ConsistencyModel(1, 1, **options), ConsistencyModel(1, 1, loss_scaling=True, **options)
    scaled.load_state_dict(plain.state_dict())
    args = (th.zeros(4, 1), th.zeros(4, 1))
    kwargs = {"noise": th.ones(4, 1), "u": th.rand(4, 1)}
    assert th.allclose(scaled.loss(*args, **kwargs), plain.loss(*args, **kwargs) * 100 / (80 - 0.002))


def test_clamped_action_learns_only_the_way_back():
    x = th.tensor([2.0, 2.0, -2.0, -2.0, 0.5], requires_grad=True)
    y = clamp_action(x)
    assert y.tolist() == [1, 1, -1, -1, 0.5]
    (grad,) = th.autograd.grad(y, x, th.tensor([1.0, -1.0, 1.0, -1.0, 3.0]))
    assert grad.tolist() == [1, 0, 0, -1, 3]


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"network": "x"}, {"bc_loss": "x"}, {"metric": "x"}, {"sampling_steps": 0}, {"curriculum": (1, 5)}),
        *({"sigma_min": 0}, {"sigma_max": float("inf")}, {"sigma_data": 0}, {"rho": -1}, {"p_std": 0}),
        {"reconstruction_levels": 1},
    ],
)
def test_bad_options_name_the_argument(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        ConsistencyModel(1, 1, **kwargs)


def test_mish_equals_pytorchs():
    # many enough for the form with a single sigmoid
    x = th.tensor([-100.0, -20, -1, 0, 1, 20, 50, 1000], dtype=th.float64).repeat(1000).requires_grad_()
    ours, theirs = Mish()(x), nn.functional.mish(x)
    assert th.allclose(ours, theirs)
    assert th.allclose(Mish()(x.detach()), theirs)
    with th.no_grad():
        x32 = 10 * th.randn(5000)
        assert th.allclose(Mish()(x32), nn.functional.mish(x32), atol=1e-5)
    grads = [th.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)]
    assert th.allclose(*grads)
    assert th.autograd.gradcheck(_MishFunction.apply, th.randn(5, dtype=th.float64, requires_grad=True))


@pytest.mark.parametrize("n", [8, 8192])
def test_mish_has_forward_derivatives_and_gradients_through_them(n):
    weight = th.linspace(-3, 3, n, dtype=th.float64, requires_grad=True)
    ones, taken = th.ones_like(weight), []
    for mish in (nn.functional.mish, Mish()):
        y, derivative = th.func.jvp(lambda x, mish=mish: mish(weight * x), (ones,), (ones,))
        taken.append((y, derivative, *th.autograd.grad(y.square().sum() + derivative.sum(), weight)))
    for expected, got in zip(*taken, strict=True):
        th.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_stacked_critics_equal_separate_networks(layer_norm):
    critic = StackedCritic(4, 2, [8, 8], n_critics=3, layer_norm=layer_norm)
    for p in critic.parameters():
        nn.init.normal_(p)
    features, actions = th.randn(5, 4), th.randn(5, 2)
    values = critic(features, actions)
    assert values.shape == (5, 3)
    for i in range(3):
        single = StackedCritic(4, 2, [8, 8], n_critics=1, layer_norm=layer_norm)
        single.load_state_dict({key: value[i : i + 1] for key, value in critic.state_dict().items()})
        assert th.allclose(single(features, actions)[:, 0], values[:, i], atol=1e-5)


def test_stacked_layers_start_like_linear_layers():
    th.manual_seed(0)
    weight = StackedMlp(64, [256], n_members=2).layers[0].weight
    assert weight.std().item() == pytest.approx(nn.Linear(64, 256).weight.std().item(), rel=0.05)


def test_ln_resnet_needs_one_width():
    with pytest.raises(ValueError, match="net_arch"):
        LnResnet(1, 1, [32, 64])


def test_training_after_inference_mode():
    """What a sampler computes once is made in the first call, whatever mode that is in."""
    model = ConsistencyModel(1, 1, sampling_steps=3, sigma_max=33.0)  # levels that no other test has
    with th.inference_mode():
        model.sample(th.randn(3, 2, 1), th.zeros(2, 1))
    model.sample(th.randn(3, 2, 1), th.zeros(2, 1)).sum().backward()


@pytest.mark.parametrize("dim", [2, 15])
def test_embedding_needs_an_even_size(dim):
    with pytest.raises(ValueError, match="embedding_dim"):
        ConsistencyModel(1, 1, network_kwargs={"embedding_dim": dim})


def test_reconstruction_draws_its_share_at_the_levels_of_the_sampler():
    u = (th.arange(3900) + 0.5) / 3900

    def levels(model):
        sigmas, zeros = [], th.zeros(len(u), 1)
        model.register_forward_pre_hook(lambda _, args: sigmas.append(args[1]))
        model.reconstruction_loss(zeros, zeros, noise=zeros, u=u[:, None])
        return sigmas[0]

    plain = levels(ConsistencyModel(1, 1, sampling_share=0.0))
    grid, counts = plain.unique(return_counts=True)
    assert th.allclose(grid, karras_sigma(th.arange(1, 40), 40)) and (counts == 100).all()
    shared = levels(ConsistencyModel(1, 1, sampling_steps=2))
    at = [th.isclose(shared, th.tensor(sigma)).float().mean().item() for sigma in sampling_sigmas(2)]
    assert at == pytest.approx([0.25 + 0.5 / 39, 0.25], abs=1e-3)  # the highest level is on the grid, too
    with pytest.raises(ValueError, match="sampling_share"):
        ConsistencyModel(1, 1, sampling_share=1.5)
