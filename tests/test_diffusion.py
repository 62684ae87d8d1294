"""The diffusion maths against closed forms."""

import math

import pytest
import torch as th

from sb3_consistency.generative.diffusion import DiffusionModel
from sb3_consistency.generative.schedules import cosine_alpha_bars, diffusion_steps_taken, vp_alpha_bars
from tests.conftest import FixedNetwork

S = 0.2  # of the Gaussian data N(0, S^2): clamping at 1 is five deviations away


class GaussianNoisePredictor(FixedNetwork):
    """E[eps | x_t] for data N(0, S^2): x_t sqrt(1 - abar) / (abar S^2 + 1 - abar)."""

    def __init__(self, alpha_bars, factor=1.0):
        super().__init__()
        self.alpha_bars = th.tensor(alpha_bars[1:], dtype=th.float64)
        self.factor = factor

    def forward(self, x, level, cond):
        abar = self.alpha_bars[level.long()].unsqueeze(-1)
        return self.factor * x * (1 - abar).sqrt() / (abar * S**2 + 1 - abar)


def exact_model(factor=1.0, **kwargs):
    model = DiffusionModel(1, 1, **kwargs).double()
    model.network = GaussianNoisePredictor(model.alpha_bars, factor)
    return model


def posterior_variance(alpha_bars, s, t):
    return (1 - alpha_bars[s]) / (1 - alpha_bars[t]) * (1 - alpha_bars[t] / alpha_bars[s])


def sample(model, n, seed=0):
    noise = th.randn(model.noise_shape(n), generator=th.Generator().manual_seed(seed), dtype=th.float64)
    return model.sample(noise, th.zeros(n, 1, dtype=th.float64))


@pytest.mark.parametrize("alpha_bars", [vp_alpha_bars, cosine_alpha_bars])
@pytest.mark.parametrize("n_steps", [1, 5, 100])
def test_schedules_destroy_the_signal_step_by_step(alpha_bars, n_steps):
    values = th.tensor([1.0, *alpha_bars(n_steps)])
    assert len(values) == n_steps + 1 and (values.diff() < 0).all()
    assert 0 < values[-1] < 0.01


def test_vp_schedule_is_the_product_of_the_papers_alphas():
    n, low, high = 5, 0.1, 10.0
    alphas = [math.exp(-low / n - (high - low) * (2 * t - 1) / (2 * n**2)) for t in range(1, n + 1)]
    assert vp_alpha_bars(n) == pytest.approx([math.prod(alphas[:t]) for t in range(1, n + 1)])


def test_cosine_schedule_is_the_squared_cosine_until_its_last_step():
    n = 50
    f = [math.cos((t / n + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(n + 1)]
    assert cosine_alpha_bars(n)[:-1] == pytest.approx([f[t] / f[0] for t in range(1, n)])
    assert cosine_alpha_bars(n)[-1] == pytest.approx(0.001 * cosine_alpha_bars(n)[-2])  # beta at its limit


def test_steps_taken_are_spread_over_all():
    assert diffusion_steps_taken(5, 5) == (5, 4, 3, 2, 1)
    assert diffusion_steps_taken(100, 4) == (100, 75, 50, 25)
    assert diffusion_steps_taken(5, 1) == (5,)
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="sampling_steps"):
            diffusion_steps_taken(5, wrong)


@pytest.mark.parametrize("beta_schedule", ["vp", "cosine"])
def test_loss_is_smallest_for_the_conditional_mean_of_the_noise(beta_schedule):
    generator = th.Generator().manual_seed(0)
    x0 = S * th.randn(200_000, 1, dtype=th.float64, generator=generator)
    noise = th.randn(x0.shape, dtype=th.float64, generator=generator)
    u = th.rand(x0.shape, dtype=th.float64, generator=generator)

    def loss(factor):
        model = exact_model(factor, beta_schedule=beta_schedule)
        return model.loss(x0, th.zeros_like(x0), noise=noise, u=u).mean().item()

    assert loss(1.0) < min(loss(0.97), loss(1.03))
    abar = th.tensor(exact_model(beta_schedule=beta_schedule).alpha_bars[1:], dtype=th.float64)
    assert loss(1.0) == pytest.approx((abar * S**2 / (abar * S**2 + 1 - abar)).mean().item(), rel=0.02)


def test_one_ancestral_step_draws_from_the_posterior():
    """With the clean action known, x_s | x_t, x_0 has the mean and variance of Ho et al., equations 6 and 7."""
    model = DiffusionModel(1, 1, diffusion_steps=2).double()
    bars, x0 = model.alpha_bars, 0.3
    x_t = 0.7

    class Oracle(FixedNetwork):
        def forward(self, x, level, cond):
            abar = bars[int(level) + 1]
            return (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)

    seen = []

    class Recorder(Oracle):
        def forward(self, x, level, cond):
            seen.append(x)
            return super().forward(x, level, cond)

    model.network = Recorder()
    noise = th.randn(2, 100_000, 1, dtype=th.float64, generator=th.Generator().manual_seed(0))
    noise[0] = x_t
    assert th.allclose(model.sample(noise, th.zeros(100_000, 1)), th.tensor(x0, dtype=th.float64))
    alpha, beta = bars[2] / bars[1], 1 - bars[2] / bars[1]
    mean = (math.sqrt(bars[1]) * beta * x0 + math.sqrt(alpha) * (1 - bars[1]) * x_t) / (1 - bars[2])
    assert seen[1].mean().item() == pytest.approx(mean, abs=0.005)
    assert seen[1].var().item() == pytest.approx((1 - bars[1]) / (1 - bars[2]) * beta, rel=0.02)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("beta_schedule", ["vp", "cosine"])
def test_exact_noise_predictor_samples_the_data_in_the_limit_of_many_steps(sampler, beta_schedule):
    errors = {}
    for n_steps in (5, 50, 500):
        model = exact_model(diffusion_steps=n_steps, sampler=sampler, beta_schedule=beta_schedule)
        errors[n_steps] = abs(sample(model, 40_000).std().item() / S - 1)
    assert errors[500] < 0.03 and errors[500] < errors[5] / 4


def test_variance_of_ancestral_samples_follows_the_closed_recursion():
    """For a linear predictor every step is x <- g x + sqrt(v) z."""
    model = exact_model(diffusion_steps=5)
    variance, bars = 1.0, model.alpha_bars
    for t in range(5, 0, -1):
        v = posterior_variance(bars, t - 1, t) if t > 1 else 0.0
        clean = math.sqrt(bars[t]) * S**2 / (bars[t] * S**2 + 1 - bars[t])
        alpha = bars[t] / bars[t - 1]
        gain = (math.sqrt(bars[t - 1]) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - bars[t - 1])) / (1 - bars[t])
        variance = gain**2 * variance + v
    assert sample(model, 200_000).var().item() == pytest.approx(variance, rel=0.02)


def test_ddim_is_deterministic_and_converges_to_the_probability_flow():
    """Its limit maps x_T to x_T S / sqrt(abar_T S^2 + 1 - abar_T); first order: errors fall with the step."""
    noise = th.randn(1, 1000, 1, dtype=th.float64, generator=th.Generator().manual_seed(0))
    errors = []
    for n_steps in (25, 50, 100):
        model = exact_model(diffusion_steps=100, sampling_steps=n_steps, sampler="ddim")
        draws = [th.cat([noise, th.randn(n_steps - 1, 1000, 1, dtype=th.float64)]) for _ in range(2)]
        samples, again = (model.sample(d, th.zeros(1000, 1)) for d in draws)
        assert th.equal(samples, again)
        abar = model.alpha_bars[-1]
        exact = noise[0] * S / math.sqrt(abar * S**2 + 1 - abar)
        errors.append((samples - exact).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.06 * S


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_skipping_steps_is_the_coarser_chain(sampler):
    """The VP schedule depends on t / T alone, so every fourth of 400 steps is the chain of 100 steps."""
    skipping = exact_model(diffusion_steps=400, sampling_steps=100, sampler=sampler)
    assert th.allclose(sample(skipping, 1000), sample(exact_model(diffusion_steps=100, sampler=sampler), 1000))


def test_the_q_gradient_flows_through_all_steps():
    model = DiffusionModel(2, 3, diffusion_steps=4)
    outputs = []
    last = model.network.layers[-1]
    last.register_forward_hook(lambda module, args, output: (output.retain_grad(), outputs.append(output))[1])
    model.sample(0.1 * th.randn(model.noise_shape(8)), th.randn(8, 3)).sum().backward()
    assert len(outputs) == 4 and all(output.grad.abs().sum() > 0 for output in outputs)


@pytest.mark.parametrize(
    "kwargs",
    [{"diffusion_steps": 0}, {"beta_schedule": "x"}, {"sampler": "x"}, {"sampling_steps": 6}, {"network": "x"}],
)
def test_bad_options_name_the_argument(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        DiffusionModel(1, 1, **kwargs)
