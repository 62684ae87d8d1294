"""CPQL with a teacher: one pass keeps the teacher's modes, and contains the choice among its actions."""

import numpy as np
import pytest
import torch as th

from sb3_consistency import CPQL
from sb3_consistency.algorithms.cpql import DETERMINISTIC_ROWS, TEACHERS
from tests.conftest import SMALL, make_arrays, weights

OBS = np.random.default_rng(0).uniform(-1, 1, (40, 3)).astype(np.float32)


def distilling(**kwargs):
    model = CPQL("MlpPolicy", dataset=make_arrays(action_dim=2), bc_loss="distill", **{**SMALL, **kwargs})
    model.load_dataset(model.dataset)
    return model


def drawn(model):
    obs = th.as_tensor(OBS)
    noise = model.actor_noise(model.actor.features(obs))
    return obs, noise, model.distillation_target(obs, noise)


def test_a_quarter_of_the_rows_has_no_noise():
    noise = distilling().actor_noise(th.zeros(40, 3))
    still = noise.abs().sum(dim=(0, 2)) == 0
    assert still[DETERMINISTIC_ROWS].all() and still.sum() == 10
    assert CPQL("MlpPolicy", dataset=make_arrays(), **SMALL).actor_noise(th.zeros(40, 3)).abs().min() > 0


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("n", [1, 4])
def test_rows_with_noise_learn_the_teachers_action_of_the_same_noise(n, teacher):
    model = distilling(target_candidates=n, distill_teacher=teacher)
    obs, noise, target = drawn(model)
    same = model.teacher.model.sample(noise, model.teacher.features(obs))
    rows = th.arange(40) % 4 != 0 if n > 1 else slice(None)
    th.testing.assert_close(target[rows], same[rows])


@pytest.mark.parametrize("teacher", TEACHERS)
def test_rows_without_noise_learn_the_best_of_several_actions(teacher, monkeypatch):
    model = distilling(target_candidates=256, distill_teacher=teacher)
    monkeypatch.setattr(model.teacher.model, "sample", lambda noise, features: noise[0].clamp(-1, 1))

    def targets(value):
        monkeypatch.setattr(model.critic.q_networks, "forward", lambda f, a: value(a).unsqueeze(1).expand(-1, 2))
        return drawn(model)[2]

    goal = th.tensor([0.3, -0.2])
    near = (targets(lambda a: 1 - (a - goal).square().sum(1)) - goal).norm(dim=1)
    with_noise = near.view(-1, 4)[:, 1:]
    assert near[DETERMINISTIC_ROWS].max() < 0.3 and with_noise.median() > 0.5
    # where all are equally good, the first stays; where it is the best, too
    for value in (lambda a: th.ones(len(a)), lambda a: 1 - a.square().sum(1)):
        assert targets(value)[DETERMINISTIC_ROWS].abs().max() < 1e-3


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_teacher_learns_from_the_data_alone(teacher):
    def teacher_of(eta):
        model = distilling(eta=eta, distill_teacher=teacher).pretrain(3)
        return th.cat([p.detach().flatten() for p in model.teacher.parameters()]), weights(model)

    (a, all_of_a), (b, all_of_b) = teacher_of(1.0), teacher_of(3.0)
    assert th.equal(a, b) and not th.equal(all_of_a, all_of_b)


def test_held_out_episodes_are_the_teachers():
    model = distilling()
    model.load_dataset(model.dataset, heldout_fraction=0.3)
    before = model.data.heldout_loss()
    with th.no_grad():
        model.actor.model.network.layers[-1].bias.add_(1)
    assert model.data.heldout_loss() == before


def test_deterministic_actions_are_those_without_noise(tmp_path):
    model = distilling().pretrain(2)
    actor = model.actor
    expected = actor.model.sample(th.zeros(1, 40, 2), actor.features(th.as_tensor(OBS))).detach()
    np.testing.assert_allclose(model.predict(OBS, deterministic=True)[0], expected, atol=1e-6)
    # the default is not taken for a choice of the user's
    model.save(tmp_path / "model")
    assert "noise_scale" not in CPQL.load(tmp_path / "model").policy_kwargs
    own = {**SMALL["policy_kwargs"], "noise_scale": 0.5}
    assert distilling(policy_kwargs=own).policy.actor.noise_scale == 0.5
    model.policy.noise_scale = 0.25
    model.save(tmp_path / "model")
    assert CPQL.load(tmp_path / "model").actor.noise_scale == 0.25


def test_candidates_need_noise():
    with pytest.raises(ValueError, match=r"n_eval_candidates must be 1 where noise_scale is 0.*, got 5: pass policy_kwargs"):
        distilling(n_eval_candidates=5)
    model = distilling()
    with pytest.raises(ValueError, match="n_eval_candidates"):
        model.n_eval_candidates = 5
    assert model.n_eval_candidates == model.policy.n_eval_candidates == 1
    model.policy.noise_scale = 0.5
    model.n_eval_candidates = 5
    assert model.predict(OBS, deterministic=True)[0].shape == (40, 2)


def test_a_teacher_is_not_added_later():
    model = CPQL("MlpPolicy", dataset=make_arrays(), **SMALL)
    with pytest.raises(ValueError, match="bc_loss can't become 'distill' on a CPQL that is built"):
        model.bc_loss = "distill"
    assert model.bc_loss == "reconstruction"
    model.bc_loss = "ict"
    assert model.actor.model.bc_loss == "ict"
    model = distilling(distill_teacher="consistency")
    model.bc_loss, model.metric = "distill", "l2"
    assert model.teacher.model.metric == "l2" and model.teacher.model.bc_loss == "ict"
    with pytest.raises(ValueError, match="can't become 'ict'"):
        model.bc_loss = "ict"
