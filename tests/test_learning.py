"""The algorithms learn: small tasks, seeded, thresholds well clear of chance."""

import numpy as np
import pytest
from gymnasium import spaces

from sb3_consistency import CPQL, ConsistencyAC, ConsistencyBC, DiffusionBC, DiffusionQL

BIG = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [64, 64]}, "batch_size": 128}


def bandit(n=4000, seed=0):
    """One step; two equally frequent actions, -0.5 (reward 0) and 0.5 (reward 1); the observation is noise."""
    rng = np.random.default_rng(seed)
    good = rng.integers(2, size=n)
    obs = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    return {
        "observations": obs,
        "next_observations": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "actions": (good[:, None] - 0.5 + 0.03 * rng.standard_normal((n, 1))).astype(np.float32),
        "rewards": good.astype(np.float32),
        "terminations": np.ones(n, bool),
        "truncations": np.zeros(n, bool),
    }


OBS = np.random.default_rng(5).uniform(-1, 1, (1000, 2)).astype(np.float32)


# the last of few diffusion steps goes to the mean of what is left, between modes as near as these
DIFFUSION = {"diffusion_steps": 20, "learning_rate": 5e-3}


@pytest.mark.parametrize(("cls", "kwargs"), [(ConsistencyBC, {}), (DiffusionBC, DIFFUSION)])
def test_bc_keeps_both_modes(cls, kwargs):
    data = bandit()
    data["observations"][:] = data["next_observations"][:] = 0
    model = cls("MlpPolicy", dataset=data, **BIG, **kwargs).learn(3000)
    actions = model.predict(np.zeros_like(OBS))[0][:, 0]
    near = np.minimum(np.abs(actions - 0.5), np.abs(actions + 0.5)) < 0.15
    assert near.mean() > 0.45  # a Gaussian with the data's moments has 0.24 there
    assert 0.35 < (actions > 0).mean() < 0.65


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (CPQL, {}),
        (CPQL, {"value_mode": "iql"}),
        (CPQL, {"bc_loss": "distill"}),
        (ConsistencyAC, {"eta": 20.0}),
        (ConsistencyAC, {"eta": 20.0, "sampling_steps": 1}),
        (DiffusionQL, {}),
        (DiffusionQL, {"sampling_steps": 2, "sampler": "ddim"}),
    ],
)
def test_actor_critics_pick_the_better_mode(cls, kwargs):
    model = cls("MlpPolicy", dataset=bandit(), n_candidates=1, **BIG, **kwargs).pretrain(1500)
    assert (model.predict(OBS)[0] > 0).mean() > 0.8
    q_values = model.critic(*(model.policy.obs_to_tensor(OBS)[0], model.policy.obs_to_tensor(OBS)[0][:, :1] * 0 + 0.5))
    assert q_values.mean().item() == pytest.approx(1.0, abs=0.1)


def test_candidates_pick_the_better_mode_of_a_cloned_policy():
    model = ConsistencyAC("MlpPolicy", dataset=bandit(), eta=0.0, n_candidates=20, candidate_temperature=0.05, **BIG)
    model.pretrain(1500)
    assert (model.predict(OBS)[0] > 0).mean() > 0.95


def test_critic_bootstraps_through_time_outs_only():
    """Constant reward 1: the value is 1 / (1 - gamma) where episodes time out, 1 where every step terminates."""
    rng = np.random.default_rng(0)
    n = 2000
    obs = rng.uniform(-1, 1, (n + 1, 2)).astype(np.float32)
    data = {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": np.ones(n, np.float32),
        "action_space": spaces.Box(-1, 1, (1,)),
    }
    ends = np.arange(1, n + 1) % 5 == 0
    values = {}
    for name, terminations in {"time-out": np.zeros(n, bool), "terminal": np.ones(n, bool)}.items():
        full = {**data, "terminations": terminations, "truncations": ends & ~terminations}
        model = CPQL("MlpPolicy", dataset=full, gamma=0.8, tau=0.05, learning_rate=1e-3, **BIG).pretrain(1500)
        batch = next(model.batches(1, 500))
        values[name] = model.critic(batch.observations, batch.actions).mean().item()
    assert values["time-out"] == pytest.approx(5, abs=0.4) and values["terminal"] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [CPQL, ConsistencyAC, DiffusionQL])
def test_online_pendulum(cls):
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    model = cls("MlpPolicy", "Pendulum-v1", seed=0, device="cpu").learn(8000)
    assert evaluate_policy(model, make_vec_env("Pendulum-v1", seed=1), 20)[0] > -400  # random: about -1200
