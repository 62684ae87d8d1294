"""Every network can be saved and loaded alone, as SB3's actors and critics can; large predictions are bounded in memory."""

import numpy as np
import pytest
import torch as th

from sb3_consistency import CPQL, ConsistencyAC
from sb3_consistency.policies import policy as policies
from tests.conftest import ALGORITHMS, SMALL, make_arrays


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_networks_and_policies_are_saved_alone(cls, tmp_path):
    policy = cls("MlpPolicy", dataset=make_arrays(), **SMALL).policy
    for name, network in {"policy": policy, **{name: getattr(policy, name) for name in policy.network_names()}}.items():
        network.save(tmp_path / name)
        loaded = type(network).load(tmp_path / name)
        states = network.state_dict(), loaded.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(th.equal(a, states[1][key]) for key, a in states[0].items())
        assert loaded.option_values().keys() == network.option_values().keys()


def test_a_policy_is_saved_as_its_options_are_by_now(tmp_path):
    model = ConsistencyAC("MlpPolicy", dataset=make_arrays(), **SMALL)
    model.sampling_steps, model.n_candidates, model.bc_loss = 3, 2, "reconstruction"
    model.policy.save(tmp_path / "policy")
    model.policy.actor.save(tmp_path / "actor")
    policy = type(model.policy).load(tmp_path / "policy")
    assert policy.n_candidates == 2
    for actor in (policy.actor, policy.actor_target, type(policy.actor).load(tmp_path / "actor")):
        assert (actor.model.sampling_steps, actor.model.bc_loss) == (3, "reconstruction")


@pytest.mark.parametrize("cls", [CPQL, ConsistencyAC])
def test_many_rows_of_candidates_are_taken_in_parts(cls, monkeypatch):
    model = cls("MlpPolicy", dataset=make_arrays(), n_candidates=10, n_eval_candidates=10, **SMALL)
    obs = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)
    whole = model.predict(obs, deterministic=True)[0]
    rows = []
    sample = model.policy.actor.model.sample
    monkeypatch.setattr(model.policy.actor.model, "sample", lambda noise, cond: rows.append(len(cond)) or sample(noise, cond))
    monkeypatch.setattr(policies, "MAX_CANDIDATE_ROWS", 70)
    np.testing.assert_allclose(model.predict(obs, deterministic=True)[0], whole, atol=1e-6)
    assert rows == [70, 70, 70, 40]
    assert model.predict(obs)[0].shape == whole.shape
