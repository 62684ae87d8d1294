"""Updates: whose gradient goes where, and how moving averages follow."""

import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_consistency import CPQL, ConsistencyBC
from sb3_consistency.training import gradient as acceleration
from sb3_consistency.training.updater import lerp_where
from tests.conftest import ACTOR_CRITICS, actor_critics, assert_same, every, loaded, make, trained


@every
def test_same_seed_same_result(cls):
    assert_same(trained(cls), trained(cls))
    different = trained(cls, seed=1)
    with pytest.raises(AssertionError):
        assert_same(trained(cls), different)


def test_cpiql_value_of_target_or_current_critic():
    for value_critic in ("target", "current"):
        model = trained(CPQL, value_mode="iql", value_critic=value_critic, expectile=0.9)
        assert list(model.losses()) == ["value", "critic", "actor"]


@actor_critics
def test_actor_loss_leaves_the_critic_alone(cls):
    model = trained(cls)
    batch = next(model.batches(1, 16))
    model.critic.optimizer.zero_grad(set_to_none=True)
    model.actor.optimizer.zero_grad(set_to_none=True)
    model.prepare_step()
    model.updater.step({"actor": model.actor_loss}, {}, batch, 1)
    assert all(p.grad is None for p in model.critic.parameters())
    assert any(p.grad is not None for p in model.actor.parameters())


@actor_critics
def test_targets_move_by_polyak_weights(cls):
    model = make(cls, target_policy="ema", tau=0.25, target_update_interval=2, actor_ema_decay=0.9, actor_ema_start=0)
    before = [p.clone() for p in model.critic_target.parameters()]
    model.pretrain(1)
    assert all(th.equal(p, q) for p, q in zip(before, model.critic_target.parameters(), strict=True))
    actor_before = [p.clone() for p in model.actor_target.parameters()]
    model.pretrain(1)
    for old, new, source in zip(before, model.critic_target.parameters(), model.critic.parameters(), strict=True):
        assert th.allclose(new, 0.75 * old + 0.25 * source, atol=1e-6)
    for old, new, source in zip(actor_before, model.actor_target.parameters(), model.actor.parameters(), strict=True):
        assert th.allclose(new, 0.9 * old + 0.1 * source, atol=1e-6)


@actor_critics
def test_the_actor_waits_for_its_turn(cls):
    model = make(cls, policy_delay=3, target_policy="ema", actor_ema_decay=0.5)
    watched = {name: getattr(model, name) for name in ("critic", "actor", "actor_target")}
    moved = []
    for _ in range(4):
        before = {name: [p.clone() for p in network.parameters()] for name, network in watched.items()}
        model.pretrain(1)
        moved.append(
            [n for n, x in watched.items() if any(not th.equal(p, q) for p, q in zip(before[n], x.parameters(), strict=True))]
        )
    assert moved == [["critic", "actor", "actor_target"], ["critic"], ["critic"], ["critic", "actor", "actor_target"]]


@actor_critics
@pytest.mark.parametrize(("delay", "interval"), [(1, 3), (2, 2), (2, 3)])
def test_the_actors_moving_average_counts_the_actors_updates(cls, delay, interval):
    model = make(cls, policy_delay=delay, actor_ema_interval=interval, target_policy="ema", actor_ema_decay=0.5)
    moved = []
    for step in range(3 * delay * interval):
        before = [p.clone() for p in model.actor_target.parameters()]
        model.pretrain(1)
        same = all(th.equal(p, q) for p, q in zip(before, model.actor_target.parameters(), strict=True))
        moved += [] if same else [step]
    # the actor's turns are the steps 0, delay, 2 delay, ...
    assert moved == [delay * (n * interval - 1) for n in (1, 2, 3)]


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


class CountingExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.head, self.calls = th.nn.Linear(3, 3), 0

    def forward(self, observations):
        self.calls += 1
        return self.head(observations)


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_the_actors_loss_extracts_features_once(cls):
    # with "current" the critics' loss does so, too
    kwargs = {"net_arch": [32, 32], "features_extractor_class": CountingExtractor}
    model = loaded(cls, target_policy="ema", policy_kwargs=kwargs)
    model.pretrain(1)
    assert model.alpha_now() == 1, "both terms take part"
    assert model.actor.features_extractor.calls == 1
