"""The denoiser at few levels against closed forms."""

import pytest
import torch as th

from sb3_consistency.generative.denoising import DenoisingModel
from tests.conftest import FixedNetwork

LEVELS, DATA_STD = DenoisingModel.levels, 0.5


class Scaled(FixedNetwork):
    """F(x) = factor x; 0 denoises data of the model's own standard deviation exactly."""

    def __init__(self, factor=0.0):
        super().__init__()
        self.factor = factor

    def forward(self, x, level, cond):
        return self.factor * x


def exact_model(factor=0.0):
    model = DenoisingModel(1, 1).double()
    model.network = Scaled(factor)
    return model


def test_sampling_is_eulers_method():
    """Of data N(0, s^2): D(x, sigma) = x s^2 / (s^2 + sigma^2), so that a step is a factor."""
    z = 0.2 * th.randn(3, 50, 1, dtype=th.float64)
    factor = LEVELS[0]
    for sigma, lower in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
        factor *= (DATA_STD**2 + lower * sigma) / (DATA_STD**2 + sigma**2)
    actions = exact_model().sample(z, th.zeros(50, 1, dtype=th.float64))
    # the first noise alone counts
    th.testing.assert_close(actions, factor * z[0])
    # of infinitely many levels it would be s
    assert 0.3 < factor < DATA_STD


def test_loss_is_smallest_for_the_conditional_mean():
    generator = th.Generator().manual_seed(0)
    x0 = DATA_STD * th.randn(200_000, 1, dtype=th.float64, generator=generator)
    noise, u = (f(x0.shape, dtype=th.float64, generator=generator) for f in (th.randn, th.rand))

    def loss(factor):
        return exact_model(factor).loss(x0, th.zeros(len(x0), 1), noise=noise, u=u)

    values = loss(0.0)
    # the weight makes every level count alike: E = lambda s^2 sigma^2 / (s^2 + sigma^2) = 1
    for i in range(len(LEVELS)):
        assert values[(u[:, 0] * len(LEVELS)).long() == i].mean() == pytest.approx(1, abs=0.02)
    assert values.mean() < min(loss(0.1).mean(), loss(-0.1).mean())


def test_a_uniform_number_of_one_is_the_last_level():
    model, x0 = exact_model(), th.zeros(1, 1, dtype=th.float64)
    last, first = (model.loss(x0, x0, noise=th.ones_like(x0), u=th.full_like(x0, u)) for u in (1.0, 0.0))
    for loss, sigma in ((last, LEVELS[-1]), (first, LEVELS[0])):
        skipped = sigma * DATA_STD**2 / (DATA_STD**2 + sigma**2)
        assert loss.item() == pytest.approx((sigma**-2 + DATA_STD**-2) * skipped**2)


def test_sampling_evaluates_what_the_loss_trains():
    th.manual_seed(0)
    model = DenoisingModel(2, 3)
    noise, cond = th.randn(1, 5, 2), th.randn(5, 3)
    x = LEVELS[0] * noise[0]
    for sigma, lower in zip(LEVELS, (*LEVELS[1:], 0.0), strict=True):
        clean = model(x, th.tensor([sigma]), cond).clamp(-1, 1)
        x = clean + lower / sigma * (x - clean)
    th.testing.assert_close(model.sample(noise, cond), x)
    assert model.sample(noise, cond).abs().max() <= 1


def test_it_keeps_two_narrow_modes():
    th.manual_seed(0)
    model = DenoisingModel(1, 1, network_kwargs={"net_arch": [64, 64]})
    optimizer = th.optim.Adam(model.parameters(), 3e-3)
    rate = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    cond = th.zeros(256, 1)
    for _ in range(1500):
        x0 = 0.6 * th.randn(256, 1).sign() + 0.05 * th.randn(256, 1)
        optimizer.zero_grad()
        model.loss(x0, cond, noise=th.randn(256, 1), u=th.rand(256, 1)).mean().backward()
        optimizer.step()
        rate.step()
    actions = model.sample(th.randn(1, 2000, 1), th.zeros(2000, 1)).detach()
    near = (actions.abs() - 0.6).abs() < 3 * 0.05
    assert near.float().mean() > 0.8
    assert (actions > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
