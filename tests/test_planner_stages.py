"""A planner's stages: teacher, reward, student; teachers from files."""

from itertools import pairwise

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from torch import nn

from sb3_consistency import CPQL, RACTD
from sb3_consistency.generative.temporal import (
    TemporalMlp,
)
from tests.conftest import (
    SMALL,
    assert_same,
    box_env,
    make_arrays,
    make_planner,
)

OBS = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)


def test_thirty_steps_visit_all_stages():
    model = make_planner()
    stages = []
    model.losses, losses = lambda: stages.append(model.stage) or losses(), model.losses
    model.learn(30)
    assert stages == 12 * ["teacher"] + 3 * ["reward"] + 15 * ["student"]
    assert model.num_timesteps == 30 and model.plan(OBS).shape == (5, 16, 1)


def test_a_stage_trains_its_own_networks_only():
    model = make_planner(teacher_steps=4, reward_steps=4)
    names = model.policy.network_names()

    def snapshot():
        return {n: [p.clone() for p in getattr(model.policy, n).parameters()] for n in names}

    def changed(before, after):
        return {n for n in names if any(not th.equal(a, b) for a, b in zip(before[n], after[n], strict=True))}

    expected = [{"teacher_model", "teacher_ema"}, {"reward_model"}, {"student"}]
    states = [snapshot()]
    for _ in range(3):
        model.pretrain(4)
        states.append(snapshot())
    assert [changed(a, b) for a, b in pairwise(states)] == expected


def test_only_the_network_of_the_stage_is_in_training_mode():
    model = make_planner(teacher_steps=4, reward_steps=4)
    modes = []
    model.losses, losses = lambda: modes.append(in_training()) or losses(), model.losses

    def in_training():
        return [name for name in model.policy.network_names() if getattr(model.policy, name).training]

    model.pretrain(12)
    assert modes == 4 * [["teacher_model"]] + 4 * [["reward_model"]] + 4 * [["student"]]
    model.predict(OBS)
    assert in_training() == []


@pytest.mark.parametrize(("steps", "stage"), [(0, "teacher"), (3, "teacher"), (4, "reward")])
def test_before_its_student_stage_a_planner_does_not_act(steps, stage):
    model = make_planner(teacher_steps=4, reward_steps=2)
    model.pretrain(steps)
    told = f"its {stage} stage.*{steps} gradient steps" if steps else "has not been trained"
    for method in (model.predict, model.plan):
        with pytest.raises(RuntimeError, match=f"{told}.*teacher_plan"):
            method(OBS)
    assert model.teacher_plan(OBS, steps=3).shape == (5, 16, 1)
    model.pretrain(6 - steps)
    # warm-started, not yet trained: one step from pure noise is the teacher's estimate there
    assert model.stage == "student" and model.predict(OBS)[0].shape == (5, 1)


def test_student_starts_as_the_teacher_and_the_teacher_is_frozen():
    model = make_planner(teacher_steps=4, reward_steps=1)
    model.pretrain(5)
    model.predict(OBS)
    cond = model.policy.student.condition(model.policy.conditions(th.as_tensor(OBS)[:, None]))
    x, t = th.randn(5, 16, 1), th.full((5,), 3.0)
    student, teacher = model.policy.student.model, model.policy.teacher_model.model
    assert th.allclose(student.scaled_network(x, cond, t, t / 2), teacher(x, t, cond), atol=1e-6)


@pytest.mark.parametrize("at", [5, 13, 20])
def test_resuming_inside_a_stage_changes_nothing(at, tmp_path):
    arrays = make_arrays()
    whole = make_planner(arrays=arrays, policy_kwargs={"net_arch": [16, 16], "dropout": 0.1})
    whole.pretrain(30, callback=CheckpointCallback(at, str(tmp_path)))
    resumed = RACTD.load(tmp_path / f"rl_model_{at}_steps.zip", env=box_env())
    resumed.load_dataset(arrays)
    assert resumed.stage_ends() == (12, 15) and resumed.n_updates == at
    again = RACTD.load(tmp_path / f"rl_model_{at}_steps.zip", env=box_env())
    again.load_dataset(arrays)
    for model in (resumed, again):
        model.set_random_seed(3)
        model.pretrain(30 - at)
    assert_same(resumed, again)
    rates = [
        getattr(m.policy, n).optimizer.param_groups[0]["lr"] for m in (whole, resumed) for n in m.policy.trained_networks()
    ]
    assert rates[:3] == pytest.approx(rates[3:])
    steps = [
        next(iter(getattr(resumed.policy, n).optimizer.state.values()))["step"] for n in resumed.policy.trained_networks()
    ]
    assert [int(s) for s in steps] == [12, 15, 3]


def test_learning_rate_rises_and_falls_in_every_stage():
    model = make_planner(
        teacher_steps=100, reward_steps=100, curriculum_steps=300, batch_size=2, learning_rate=1.0, warmup_steps=10
    )
    model.pretrain(0)  # sets up the logger
    model.in_offline_phase = True  # as it is inside pretrain()
    rates = []
    for step in range(300):
        model._n_updates = step
        model.update_learning_rates()
        rates.append(getattr(model.policy, next(iter(model.losses()))).optimizer.param_groups[0]["lr"])
    for start in (0, 100, 200):
        stage = rates[start : start + 100]
        assert stage[0] == pytest.approx(1 / 11) and max(stage) > 0.95 and stage[-1] < 1e-3


@pytest.mark.parametrize(
    ("lengths", "n_planned", "calls"),
    [((100, 50), 150, (150, 100)), ((0.4, 0.1), 50, (50, 100)), ((20, 10), 80, (80, 100)), ((20, 10), 80, (60, 120))],
)
def test_learning_rate_rises_and_falls_in_calls_beyond_the_plan(lengths, n_planned, calls):
    options = {"batch_size": 2, "learning_rate": 1.0, "warmup_steps": 10, "curriculum_steps": n_planned}
    model = make_planner(teacher_steps=lengths[0], reward_steps=lengths[1], **options)
    rates = []

    def record(*_):
        rates.append(getattr(model.policy, next(iter(model.losses()))).optimizer.param_groups[0]["lr"])
        return True

    for n_steps in calls:
        model.pretrain(n_steps, callback=record)
    beyond = rates[n_planned:]
    assert beyond[0] == pytest.approx(1 / 11) and np.argmax(beyond) == 10 and beyond[-1] < 1e-3
    assert (np.diff(beyond[10:]) < 0).all()


def test_one_teacher_for_many_students(tmp_path):
    make_planner(teacher_steps=6, reward_steps=1).pretrain(6).save(tmp_path / "teacher")
    path = str(tmp_path / "teacher.zip")
    source = RACTD.load(path)
    student = make_planner(teacher=path, reward_steps=0.7)  # the default of teacher_steps and this are more than the run
    assert student.stage == "reward"
    for name in ("teacher_model", "teacher_ema"):
        ours, theirs = (getattr(m.policy, name).state_dict() for m in (student, source))
        assert all(th.equal(ours[key], theirs[key]) for key in theirs)
    np.testing.assert_array_equal(
        student.teacher_plan(OBS, steps=5, deterministic=True), source.teacher_plan(OBS, steps=5, deterministic=True)
    )
    student.pretrain(10)
    assert student.stage_ends() == (0, 7) and student.teacher == path
    student.save(tmp_path / "student")
    assert_same(student, RACTD.load(tmp_path / "student"))
    (tmp_path / "teacher.zip").unlink()
    RACTD.load(tmp_path / "student").predict(OBS)  # the file is no longer needed
    with pytest.raises((ValueError, FileNotFoundError)):
        make_planner(teacher=path)


def test_a_teacher_that_was_saved_before_there_was_a_stride(tmp_path):
    old = make_planner(teacher_steps=6).pretrain(2)
    del old.stride
    old.save(tmp_path / "teacher")
    assert make_planner(teacher=str(tmp_path / "teacher")).stride == 1


def test_a_teacher_must_fit(tmp_path):
    make_planner(teacher_steps=6).pretrain(2).save(tmp_path / "teacher")
    path = str(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher: .*horizon=16.*8"):
        make_planner(teacher=path, horizon=8)
    with pytest.raises(ValueError, match=r"teacher: .*teacher_ema.model.network"):
        make_planner(teacher=path, policy_kwargs={"net_arch": [16]})
    # weights of the same shapes, but another function
    for kwargs, told in [
        ({"activation_fn": nn.ReLU}, r"Mish\(\), this model has .*ReLU\(\)"),
        ({"model_kwargs": {"sigma_data": 0.1}}, r"sigma_data=0.5, this model has .*sigma_data=0.1"),
        ({"model_kwargs": {"sigma_max": 20.0}}, r"sigma_max=80.0, .*sigma_max=20.0"),
        ({"model_kwargs": {"network_kwargs": {"embedding_scale": 5.0}}}, r"scale=1.0, this model has scale=5.0"),
    ]:
        with pytest.raises(ValueError, match=f"teacher: .*teacher was trained with .*{told}"):
            make_planner(teacher=path, policy_kwargs={**SMALL["policy_kwargs"], **kwargs})
    CPQL("MlpPolicy", box_env(), **SMALL).save(tmp_path / "cpql")
    with pytest.raises(ValueError, match=r"teacher: .*cpql.zip: This is a model of another algorithm.*Pass a file of RACTD"):
        make_planner(teacher=str(tmp_path / "cpql.zip"))
    with pytest.raises(FileNotFoundError, match=r"^teacher: .*nope.zip: there is no such file"):
        make_planner(teacher=str(tmp_path / "nope.zip"))


def test_a_teacher_must_be_trained(tmp_path):
    make_planner().save(tmp_path / "untrained")
    with pytest.raises(ValueError, match=r"teacher: .*untrained has taken no gradient step"):
        make_planner(teacher=str(tmp_path / "untrained"))


def test_returns_are_discounted_by_the_gamma_of_now(arrays):
    arrays["rewards"][:] = 1
    model = make_planner(arrays=arrays)
    assert model.policy.reward_model.high > 10
    model.gamma = 0.5
    model.pretrain(1)
    assert model.data.windows().returns.max() <= 2 and model.policy.reward_model.high <= 2


def test_a_loaded_model_keeps_its_teacher(tmp_path):
    make_planner(teacher_steps=6).pretrain(2).save(tmp_path / "teacher")
    path, own = str(tmp_path / "teacher"), str(tmp_path / "model")
    make_planner(teacher=path).save(own)
    for name, other in ((path, own), (path, "nope.zip"), (own, None)):
        with pytest.raises(ValueError, match=r"teacher: load\(\) takes no other teacher"):
            RACTD.load(name, teacher=other)
    assert RACTD.load(own, teacher=path).stage == "reward" and RACTD.load(path, teacher=None).stage == "teacher"


def test_taking_a_teacher_draws_the_models_own_random_numbers(tmp_path):
    make_planner(teacher_steps=6, seed=5).pretrain(2).save(tmp_path / "teacher")
    drawn = [(make_planner(teacher=str(tmp_path / "teacher"), seed=seed), th.rand(1))[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_student_has_its_teachers_network():
    policy_kwargs = {"net_arch": [8, 8], "activation_fn": nn.SiLU, "student_kwargs": {"network_kwargs": {"dropout": 0.1}}}
    model = make_planner(policy_kwargs=policy_kwargs, teacher_steps=1, reward_steps=1).pretrain(4)
    teacher, student = (n.model.network.layers for n in (model.policy.teacher_model, model.policy.student))
    assert [type(layer) for layer in teacher] == [type(layer) for layer in student]
    assert [layer.p for layer in student if isinstance(layer, nn.Dropout)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"sigma_min": 0.002}, r"student_kwargs'\]: sigma_min must be the teacher's.*0.002; pass it .*model_kwargs"),
        ({"network_kwargs": {"net_arch": [4]}}, r"net_arch must be the teacher's.*\[4\]; pass it in .*model_kwargs"),
    ],
)
def test_a_student_is_not_of_other_maths_than_its_teacher(kwargs, told):
    with pytest.raises(ValueError, match=told):
        make_planner(policy_kwargs={**SMALL["policy_kwargs"], "student_kwargs": kwargs})
    make_planner(policy_kwargs={**SMALL["policy_kwargs"], "student_kwargs": kwargs, "model_kwargs": kwargs})


def test_network_options_of_before_still_load(tmp_path):
    model = make_planner()
    odd = {"model_kwargs": {"network": "unet"}, "student_kwargs": {"sigma_min": 0.002}}
    model.policy_kwargs = {**model.policy_kwargs, **odd}
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model.safe")
    for loaded in (RACTD.load(tmp_path / "model"), RACTD.load_safe(tmp_path / "model.safe")):
        assert loaded.policy.student.model.sigma_min == 0.002
        assert isinstance(loaded.policy.student.model.network, TemporalMlp)


def test_returns_are_scaled_anew_until_the_reward_stage_has_begun(tmp_path):
    def scaled_returns(model, arrays):
        model.load_dataset(arrays)
        returns = next(model.batches(1, 2000)).returns
        return returns.min().item(), returns.max().item()

    arrays, larger = make_arrays(), make_arrays()
    larger["rewards"] *= 10
    model = make_planner(arrays=arrays, teacher_steps=2, reward_steps=2).pretrain(1)
    model.save(tmp_path / "model")
    assert scaled_returns(model, larger) == pytest.approx((-1, 1), abs=0.01)
    assert scaled_returns(RACTD.load(tmp_path / "model", gamma=0.5), arrays) == pytest.approx((-1, 1), abs=0.01)
    assert scaled_returns(model.pretrain(1), arrays) == pytest.approx((-1, 1), abs=0.01)
    assert scaled_returns(model.pretrain(1), larger)[1] > 10  # what R has begun to learn keeps its scale


def test_evaluations_wait_for_the_student(tmp_path):
    model = RACTD("MlpPolicy", box_env(), dataset=make_arrays(), **SMALL)
    evaluation = EvalCallback(box_env(), n_eval_episodes=1, eval_freq=5, log_path=str(tmp_path), verbose=0)
    model.pretrain(20, callback=[evaluation])  # teacher 8, reward model 2
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [10, 15, 20]


def test_an_evaluation_asks_the_model_that_it_is_given_to():
    class Note(BaseCallback):
        def _on_step(self):
            evaluated.append(self.model)
            return True

    evaluated = []
    evaluation = EvalCallback(box_env(), callback_after_eval=Note(), n_eval_episodes=1, eval_freq=1, verbose=0)
    waiting, acting = make_planner(teacher_steps=50), make_planner(teacher_steps=1, reward_steps=1).pretrain(2)
    for model in (waiting, acting, waiting, acting):
        model.pretrain(2, callback=evaluation)
    assert evaluated == 4 * [acting]
    assert evaluation._on_step.args[1].__func__ is EvalCallback._on_step  # not wrapped anew by every call
