"""Critics of quantiles, TQC's: what they learn, what the target leaves out."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_consistency import CPQL, DiffusionQL
from sb3_consistency.values.critics import StackedCritic
from sb3_consistency.values.losses import lowest_quantiles, td_target
from tests.conftest import SMALL


def test_value_is_the_mean_of_the_quantiles():
    critic, features, actions = StackedCritic(4, 2, [8], n_critics=3, n_quantiles=5), th.randn(6, 4), th.randn(6, 2)
    quantiles = critic.quantiles(features, actions)
    assert quantiles.shape == (6, 3, 5)
    th.testing.assert_close(critic(features, actions), quantiles.mean(dim=2))
    th.testing.assert_close(critic(features, actions, th.tensor([2])), quantiles[:, 2:].mean(dim=2))


def test_the_highest_of_all_critics_are_left_out():
    quantiles = th.tensor([[[5.0, 1.0, 9.0], [2.0, 8.0, 7.0]]])
    assert lowest_quantiles(quantiles, 1).tolist() == [[1.0, 2.0, 5.0, 7.0]]
    assert lowest_quantiles(quantiles, 0).tolist() == [[1.0, 2.0, 5.0, 7.0, 8.0, 9.0]]
    target = td_target(th.tensor([[1.0]]), th.tensor([[0.0]]), 0.5, lowest_quantiles(quantiles, 2))
    assert target.tolist() == [[1.5, 2.0]]


def coins(n=2000):
    """From -1 to 1 for nothing, and there 0 or 20, by chance; actions do nothing."""
    rng = np.random.default_rng(0)
    obs = rng.choice([-1.0, 1.0], size=(n, 1)).astype(np.float32)
    last = obs[:, 0] > 0
    return {
        "observations": obs,
        "next_observations": np.ones_like(obs),
        "actions": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": (20 * last * rng.integers(2, size=n)).astype(np.float32),
        "terminations": last,
        "truncations": ~last,
        "action_space": spaces.Box(-1, 1, (1,), np.float32),
    }


@pytest.mark.parametrize(("dropped", "first"), [(0, 10), (2, 20 / 6)])
def test_they_learn_the_distribution_of_returns(dropped, first):
    options = {**SMALL, "policy_kwargs": {"net_arch": [32], "n_quantiles": 5}, "gamma": 1.0, "learning_rate": 1e-2}
    # actions do nothing: the actor need not learn
    model = CPQL("MlpPolicy", dataset=coins(), top_quantiles_to_drop_per_net=dropped, policy_delay=1000, **options)
    model.pretrain(1000)
    with th.no_grad():
        before, last = model.critic.quantiles(th.tensor([[-1.0], [1.0]]), th.zeros(2, 1)).sort(dim=2).values
    for critic in last.numpy():  # the one in the middle is anything between
        assert critic[[0, 1, 3, 4]] == pytest.approx([0, 0, 20, 20], abs=2)
    # of ten numbers, four 0, two of the middle and four 20, the target of the state before has all, or the lower six
    expected = first + (last[:, 2].mean().item() - 10) / (5 if dropped == 0 else 3)
    assert before.mean().item() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("cls", [CPQL, DiffusionQL])
def test_what_makes_no_sense_with_them_is_refused(cls):
    policy_kwargs = {**SMALL["policy_kwargs"], "n_quantiles": 5}
    with pytest.raises(ValueError, match=r"top_quantiles_to_drop_per_net must be below n_quantiles, 5, .* got 5"):
        cls("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, top_quantiles_to_drop_per_net=5)
    model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs)
    for name in ("q_norm", "max_q_backup"):
        with pytest.raises(ValueError, match=f"{name} must be False with critics of quantiles"):
            setattr(model, name, True)
