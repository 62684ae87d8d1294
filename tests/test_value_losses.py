"""Value losses against closed forms."""

import pytest
import torch as th

from sb3_consistency.values.losses import (
    batch_normalised,
    choose_candidate,
    expectile_loss,
    gumbel_noise,
    normalised_q_loss,
    pessimistic_value,
    td_target,
    twin_q_loss,
)


def test_terminal_steps_do_not_bootstrap():
    target = td_target(th.tensor([[1.0], [1.0]]), th.tensor([[0.0], [1.0]]), 0.9, th.tensor([[10.0], [10.0]]))
    assert target.tolist() == [[10.0], [1.0]]


def test_td_target_rejects_shapes_that_would_broadcast():
    for shapes in [((4, 1), (4,), (4, 1)), ((4, 1), (4, 1), (4,)), ((4, 1), (4, 1), (3, 1))]:
        rewards, dones, next_values = map(th.zeros, shapes)
        with pytest.raises(ValueError, match=r"\(B, 1\)"):
            td_target(rewards, dones, 0.9, next_values)


def test_pessimistic_value_of_all_and_of_a_pair():
    q = th.tensor([[3.0, 1.0, 2.0]])
    assert pessimistic_value(q).tolist() == [[1.0]]
    assert pessimistic_value(q, th.tensor([0, 2])).tolist() == [[2.0]]


def test_twin_q_loss_sums_over_critics_and_stops_the_target():
    q = th.zeros(4, 2, requires_grad=True)
    target = th.ones(4, 1, requires_grad=True)
    loss = twin_q_loss(q, target)
    assert loss == 2.0
    loss.backward()
    assert target.grad is None and th.allclose(q.grad, th.full((4, 2), -0.5))


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_minimiser_of_expectile_loss(expectile):
    """The expectile of a uniform distribution on [0, 1]: sqrt(e) / (sqrt(e) + sqrt(1 - e))."""
    samples = (th.arange(100_000, dtype=th.float64) + 0.5) / 100_000
    value = th.tensor(expectile**0.5 / (expectile**0.5 + (1 - expectile) ** 0.5), dtype=th.float64, requires_grad=True)
    (slope,) = th.autograd.grad(expectile_loss(samples - value, expectile), value)
    assert slope.abs() < 1e-6


def test_normalised_q_ignores_the_scale_of_rewards():
    q, other = th.rand(10, requires_grad=True), th.rand(10)
    a, b = normalised_q_loss(q, other), normalised_q_loss(100 * q, 100 * other)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)


def test_batch_normalised_has_unit_deviation():
    assert batch_normalised(100 * th.randn(1000, 1)).std(unbiased=False) == pytest.approx(1, rel=1e-5)
    for same in (th.full((1, 1), 3.0), th.full((5, 1), 3.0)):
        assert th.equal(batch_normalised(same), same)


def test_best_candidate():
    actions = th.arange(6.0).view(2, 3, 1)
    assert choose_candidate(th.tensor([[0.0, 2, 1], [5, 0, 0]]), actions).tolist() == [[1.0], [3.0]]


def test_gumbel_choice_draws_from_the_softmax():
    th.manual_seed(0)
    q = th.tensor([0.0, 1.0, 2.0]).expand(100_000, 3)
    actions = th.arange(3.0).view(1, 3, 1).expand(100_000, 3, 1)
    for temperature in (1.0, 2.0):
        drawn = choose_candidate(q, actions, gumbel_noise(th.rand(100_000, 3)), temperature)
        shares = th.bincount(drawn.flatten().long(), minlength=3) / 100_000
        assert th.allclose(shares, th.softmax(q[0] / temperature, dim=0), atol=0.01)
