"""Divergence: a step that is not finite is left out, and the run stops or goes on."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_consistency import CPQL, ConsistencyAC, DivergenceError
from tests.conftest import ACTOR_CRITICS, SMALL, assert_equal_states, loaded, state_of, weights


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
    assert model.n_updates < 100, "the run should have stopped at the next look, not at the end"


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
