"""Options: declared once, checked, one copy of the truth on a running model; wrong ones are told with what to do."""

import inspect
import pickle

import numpy as np
import pytest
import torch as th
from stable_baselines3.sac.policies import SACPolicy

from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC, DiffusionQL
from sb3_consistency.algorithms.actor_critic import ActorCritic
from sb3_consistency.algorithms.cpql import TEACHERS
from sb3_consistency.files.zip import ModelFileError
from sb3_consistency.generative.consistency import ConsistencyActorOptions, ConsistencyModel
from sb3_consistency.generative.edm import EDMModel
from sb3_consistency.options import MISSING, Options, option, options_of, shared_options
from sb3_consistency.planning.planner import PlannerPolicy
from sb3_consistency.policies.policy import GenerativePolicy
from tests.conftest import ALGORITHMS, SMALL, box_env, every, loaded, make, make_arrays

#: another valid value of options that have no limits to guess one from
OTHERS = {
    "actor_learning_rate": 1e-4,
    "action_noise": None,
    "cosine_lr_decay": True,
    "max_grad_norm": 5.0,
    "curriculum_steps": 7,
    "dataset": "some/other-v0",
    "dataset_kwargs": {"top_fraction": 0.5},
    "offline_fraction": 0.25,
    "alpha": 0.5,
    "train_sampling_steps": 2,
    "executed_steps": 1,
    "tracking_gains": (2.0, 1.0),
    "metric": "l2",
    "curriculum": (3, 20),
    "teacher": "file.zip",
    "expectile": 0.8,
    "reward_steps": 0.2,
    "teacher_steps": 0.3,
    "stride": 2,
    "pretrain_steps": 0,
    "ent_coef": 0.5,
    "target_entropy": -2.0,
}
CASES = [(cls, name) for cls in ALGORITHMS for name, o in options_of(cls).items() if not o.sb3]


def another(declared, value):
    if declared.name in OTHERS:
        return OTHERS[declared.name]
    if declared.one_of:
        return next(x for x in declared.one_of if x != value)
    if isinstance(value, bool):
        return not value
    if value is None:
        return 2
    if isinstance(value, int):
        return value + 1
    return value * 0.5 if value else 0.25


@pytest.fixture(scope="module")
def models():
    return {cls: cls("MlpPolicy", dataset=make_arrays(), **SMALL) for cls in ALGORITHMS}


@pytest.mark.parametrize(("cls", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_an_option_acts_when_it_is_set_or_says_how_it_can_be(models, cls, name):
    model, declared = models[cls], options_of(cls)[name]
    before = vars(model)[declared.attribute]
    value = another(declared, before)
    if declared.fixed:
        with pytest.raises(AttributeError, match=rf"{name} can't be changed .* load\(..., {name}=...\)"):
            setattr(model, name, value)
        assert vars(model)[declared.attribute] is before
        return
    setattr(model, name, value)
    try:
        holders = [m for m in model.policy.modules() if name in shared_options(type(m), cls)]
        assert all(getattr(holder, name) == value for holder in holders)
        assert getattr(model, name) == value
    finally:
        setattr(model, name, before)


@pytest.mark.parametrize("cls", [CPQL, RACTD, DiffusionQL])
def test_an_option_of_a_module_is_checked_and_handed_down_or_refused(models, cls):
    policy = models[cls].policy
    for module in {type(m): m for m in policy.modules() if isinstance(m, Options)}.values():
        for name, declared in options_of(type(module)).items():
            if declared.fixed and declared.attribute in vars(module):
                before = vars(module)[declared.attribute]
                with pytest.raises(AttributeError, match=f"{name} can't be changed"):
                    setattr(module, declared.attribute, object())
                assert vars(module)[declared.attribute] is before
    before = policy.noise_seed, policy.noise_scale
    with pytest.raises(ValueError, match="noise_scale must be"):
        policy.noise_scale = -1.0
    assert policy.noise_scale == before[1]
    if models[cls].can_act:
        actions = [policy.predict(np.zeros(3, np.float32), deterministic=True)[0] for policy.noise_seed in (before[0], 5)]
        assert (actions[0] != actions[1]).all()
    policy.noise_seed = before[0]


@pytest.mark.parametrize("cls", [CPQL, RACTD])
def test_an_option_set_on_a_policy_is_saved_with_the_model(models, cls, tmp_path):
    model, given = cls("MlpPolicy", dataset=make_arrays(), **SMALL), dict(SMALL["policy_kwargs"])
    model.policy.noise_seed, model.policy.noise_scale = 5, 0.25
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model")
    for back in (cls.load(tmp_path / "model"), cls.load_safe(tmp_path / "model")):
        networks = [m for m in back.policy.modules() if "noise_seed" in options_of(type(m))]
        assert len(networks) > 1 and all((m.noise_seed, m.noise_scale) == (5, 0.25) for m in networks)
    models[cls].save(tmp_path / "unchanged")
    assert given == SMALL["policy_kwargs"] == models[cls].policy_kwargs


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_every_option_is_documented_and_in_the_signature(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:3] == ["policy", "env", "learning_rate"]
    for name, declared in options_of(cls).items():
        assert declared.doc and name in parameters
        assert declared.default is MISSING or parameters[name].default is declared.default


def test_a_refused_value_changes_nothing(models):
    model = models[CPQL]
    refused = {"n_candidates": 0, "eta": -1.0, "bc_loss": "mse", "max_q_backup": "yes", "candidate_temperature": 0}
    for name, value in refused.items():
        before = getattr(model, name)
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            setattr(model, name, value)
        assert getattr(model, name) == before


def test_a_value_that_only_the_policy_refuses_changes_nothing_either():
    class Few(GenerativePolicy):
        def check_together(self):
            super().check_together()
            if self.n_candidates > 5:
                raise ValueError("n_candidates: at most 5")

    model = CPQL(Few, box_env(), n_candidates=3, **SMALL)
    with pytest.raises(ValueError, match="at most 5"):
        model.n_candidates = 9
    assert (model.n_candidates, model.policy.n_candidates) == (3, 3)


def test_candidates_set_on_a_model_are_those_of_the_next_prediction(models):
    model, obs = models[ConsistencyAC], np.zeros((5, 3), np.float32)

    def passes(deterministic):
        rows = []
        handle = model.policy.actor.model.network.layers.register_forward_hook(lambda *_: None)
        original = model.policy.actor.model.sample
        model.policy.actor.model.sample = lambda noise, cond: rows.append((len(noise), len(cond))) or original(noise, cond)
        try:
            model.predict(obs, deterministic=deterministic)
        finally:
            handle.remove()
            del model.policy.actor.model.sample
        return rows[0]

    before = model.n_candidates, model.sampling_steps, model.n_eval_candidates
    try:
        model.n_candidates, model.sampling_steps, model.n_eval_candidates = 3, 4, 2
        assert passes(deterministic=False) == (4, 15)
        assert passes(deterministic=True) == (4, 10)
        model.n_candidates = model.n_eval_candidates = 1
        assert passes(deterministic=False) == passes(deterministic=True) == (4, 5)
    finally:
        model.n_candidates, model.sampling_steps, model.n_eval_candidates = before


def test_a_loss_set_on_a_model_is_that_of_the_next_step(models):
    model = models[ConsistencyBC]
    model.load_dataset(model.dataset)
    batch = model.data.sample(1, 32)[0]

    def loss():
        th.manual_seed(0)
        model.prepare_step()
        return float(model.actor_loss(batch)[0])

    losses = {}
    for name in ("ict", "reconstruction"):
        model.bc_loss = name
        losses[name] = loss()
        other = ConsistencyBC("MlpPolicy", dataset=model.dataset, bc_loss=name, **SMALL)
        other.policy.load_state_dict(model.policy.state_dict())
        th.manual_seed(0)
        assert float(other.actor_loss(batch)[0]) == losses[name]
    model.bc_loss = "ict"
    assert losses["ict"] != losses["reconstruction"]


def test_options_are_saved_whole_and_later_ones_know_what_was_before(models, tmp_path, monkeypatch):
    model = models[CPQL]
    model.save(tmp_path / "model")
    loaded = CPQL.load(tmp_path / "model")
    names = [o.attribute for o in options_of(CPQL).values() if not o.sb3 and o.name != "dataset"]
    assert {n: vars(loaded)[n] for n in names} == {n: vars(model)[n] for n in names}

    class Later(CPQL):
        weight: float = option(default=2.0, low=0, before=0.0, doc="an option that came later")

    assert Later.load(tmp_path / "model").weight == 0.0
    assert Later.load(tmp_path / "model", weight=3.0).weight == 3.0
    assert Later("MlpPolicy", dataset=model.dataset, **SMALL).weight == 2.0


def test_a_plain_value_is_a_new_default_and_keeps_everything_else():
    class Mine(RACTD):
        horizon = 8

    declared, theirs = options_of(Mine)["horizon"], options_of(RACTD)["horizon"]
    assert (declared.default, theirs.default) == (8, 16)
    assert (declared.doc, declared.low, declared.owner, declared.fixed) == (theirs.doc, theirs.low, theirs.owner, theirs.fixed)


def test_defaults_that_sb3_or_a_function_hold_are_declared_as_all_others():
    class Mine(CPQL):
        learning_starts = 7
        train_freq = 3
        policy_kwargs = SMALL["policy_kwargs"]

        eta = lambda step: 0.25  # noqa: E731 # a schedule

    model = Mine("MlpPolicy", box_env())
    assert (model.learning_starts, model.train_freq.frequency, model.policy.net_arch) == (7, 3, [32, 32])
    assert model.eta(1) == 0.25 and inspect.signature(Mine).parameters["learning_starts"].default == 7


class Own(CPQL):
    def __init__(self, policy, env, own=1, **kwargs):
        self.own = own
        super().__init__(policy, env, **kwargs)


class Closed(CPQL):
    def __init__(self, policy="MlpPolicy", env=None, device="auto", _init_setup_model=True):
        super().__init__(policy, env, **{**SMALL, "device": device, "_init_setup_model": _init_setup_model})


class Further(Own):
    def __init__(self, *args, further=2, **kwargs):
        self.further = further
        super().__init__(*args, **kwargs)


class One(ConsistencyActorOptions, ActorCritic):
    model_class = ConsistencyModel


class Other(ConsistencyActorOptions, ActorCritic):
    model_class = ConsistencyModel


def test_a_users_algorithm_is_told_from_another(tmp_path):
    One("MlpPolicy", box_env(), **SMALL).save(tmp_path / "model")
    assert type(One.load(tmp_path / "model")) is One
    with pytest.raises(ModelFileError, match=r"This is a One: load it with One\.load"):
        Other.load(tmp_path / "model")


def test_what_must_be_given_is_still_known_as_such_after_pickling():
    assert pickle.loads(pickle.dumps(options_of(CPQL)["policy"])).default is MISSING


@pytest.mark.parametrize(
    ("cls", "kwargs", "positional"),
    [
        (Own, {**SMALL, "own": 3}, ["policy", "env", "own"]),
        (Closed, {}, ["policy", "env", "device", "_init_setup_model"]),
        (Further, {**SMALL, "own": 3, "further": 4}, ["policy", "env", "own"]),
    ],
)
def test_constructors_of_a_users_own_hand_on_what_they_like(cls, kwargs, positional, tmp_path):
    own = {name: value for name, value in kwargs.items() if name not in SMALL}
    model = cls("MlpPolicy", box_env(), **kwargs)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", **{name: value + 1 for name, value in own.items()})
    assert {name: getattr(model, name) for name in own} == own
    assert {name: getattr(loaded, name) - 1 for name in own} == own
    parameters = inspect.signature(cls).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == positional


def test_an_actors_learning_rate_that_is_set_is_the_only_one_that_changes():
    model = loaded(CPQL)
    model.pretrain(1)
    model.learning_rate, model.actor_learning_rate = 0.5, lambda progress: 0.25  # the first is SB3's, and waits for load()
    model.update_learning_rates()
    rates = {name: getattr(model.policy, name).optimizer.param_groups[0]["lr"] for name in ("actor", "critic")}
    assert rates == {"actor": 0.25, "critic": 3e-4}


def test_a_curriculum_that_is_given_up_stands_at_its_end():
    model = CPQL("MlpPolicy", box_env(), curriculum_steps=100, **SMALL)
    model.prepare_step()
    assert model.progress == 0
    model.curriculum_steps = None
    model.prepare_step()
    assert model.progress is None


def test_a_users_way_to_load_data_is_learns_too():
    class Shortened(ConsistencyBC):
        def load_dataset(self, dataset, *, n_rows=None, **kwargs):
            return super().load_dataset({name: rows[:n_rows] for name, rows in dataset.items()}, **kwargs)

    kwargs = {"n_rows": 40, "top_fraction": 0.5}
    model = Shortened("MlpPolicy", dataset=make_arrays(), dataset_kwargs=kwargs, **SMALL)
    model.learn(1)
    assert model.replay_buffer.size() == 20


def test_data_loaded_by_hand_is_newer_than_a_dataset_that_was_set():
    model = loaded(ConsistencyBC)
    model.dataset = make_arrays(seed=1)
    model.load_dataset(make_arrays(seed=2))
    by_hand = model.replay_buffer
    model.learn(1)
    assert model.replay_buffer is by_hand
    model.dataset = make_arrays(seed=3)
    model.learn(1)
    assert model.replay_buffer is not by_hand


def test_a_class_of_options_binds_like_a_constructor():
    class Thing(Options):
        size: int = option(kw_only=False, low=1, doc="size")
        rate: float | None = option(default=None, above=0, doc="rate")

    thing = Thing(3, rate=0.5)
    assert thing.option_values() == {"size": 3, "rate": 0.5}
    for call, message in {
        lambda: Thing(): "needs 'size'",
        lambda: Thing(1, 2): "takes 1 positional",
        lambda: Thing(1, size=2): "'size' twice",
        lambda: Thing(1, rat=2): "did you mean 'rate'",
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.slow
def test_options_set_on_a_compiled_model_act_too():
    def after_changes(compile):
        model = CPQL("MlpPolicy", dataset=make_arrays(), compile=compile, **SMALL)
        sums = []
        for name, value in {"bc_loss": "ict", "max_q_backup": True, "actor_q": "min", "train_sampling_steps": 2}.items():
            setattr(model, name, value)
            model.pretrain(2)
            sums.append(float(sum(p.double().sum() for p in model.policy.actor.parameters())))
        return sums

    np.testing.assert_allclose(after_changes(True), after_changes(False), atol=1e-4)


# what is told of wrong ones


@every
def test_unknown_arguments_are_type_errors(cls, tmp_path):
    with pytest.raises(TypeError, match="etta"):
        make(cls, etta=1)
    with pytest.raises(TypeError, match=r"use_sde.*sampling the generative policy"):
        make(cls, use_sde=True)
    model = make(cls)
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match="lerning_rate"):
        cls.load(tmp_path / "model", lerning_rate=1)


@pytest.mark.parametrize("cls", [*ALGORITHMS, GenerativePolicy, PlannerPolicy, ConsistencyModel, EDMModel])
def test_a_text_is_no_number(cls):
    numbers = [o for o in options_of(cls).values() if {int, float} & set(o.members) and o.own_check is None]
    assert numbers
    for declared in numbers:
        with pytest.raises(TypeError, match=f"^{declared.name} must be .*'x'"):
            declared.check("x")


@pytest.mark.parametrize("policy_kwargs", [{"noise_seed": -1}, {"embedding_scale": "x"}, {"model_kwargs": {"p_std": "a"}}])
def test_bad_options_of_a_policy_are_told_when_it_is_made(policy_kwargs):
    (name,) = policy_kwargs.get("model_kwargs", policy_kwargs)
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        make(ConsistencyBC, policy_kwargs={**SMALL["policy_kwargs"], **policy_kwargs})


MISPLACED = [
    (
        CPQL,
        {"policy_kwargs": {"net_archh": [4]}},
        r"policy_kwargs: unknown 'net_archh'; did you mean 'net_arch'\? known: activ",
    ),
    (RACTD, {"policy_kwargs": {"log_std_init": -3}}, r"policy_kwargs: unknown 'log_std_init'; known: "),
    (
        CPQL,
        {"policy_kwargs": {"model_kwargs": {"foo": 1}}},
        r"policy_kwargs\['model_kwargs'\]: unknown 'foo'; known: network_kwargs, .*sampling_share",
    ),
    (
        CPQL,
        {"policy_kwargs": {"model_kwargs": {"network": "ln_resnet"}}},
        r"policy_kwargs\['model_kwargs'\]: network is the policy's: pass policy_kwargs=dict\(network=...\)",
    ),
    (RACTD, {"policy_kwargs": {"model_kwargs": {"network": "unet"}}}, r"\['model_kwargs'\]: network is the policy's"),
    (RACTD, {"policy_kwargs": {"student_kwargs": {"network": "unet"}}}, r"\['student_kwargs'\]: network is the policy's"),
    (RACTD, {"policy_kwargs": {"student_kwargs": {"ctm_gama": 1}}}, r"student_kwargs.*did you mean 'ctm_gamma'\?"),
    (CPQL, {"policy_kwargs": {"n_candidates": 3}}, "policy_kwargs: pass n_candidates to CPQL itself"),
    (CPQL, {"policy_kwargs": {"model_kwargs": {"sampling_steps": 3}}}, "pass sampling_steps to CPQL itself"),
    (RACTD, {"policy_kwargs": {"horizon": 3}}, "policy_kwargs: pass horizon to RACTD itself"),
    (CPQL, {"policy_kwargs": {"networks": {}}}, "policy_kwargs: CPQL sets networks"),
    (CPQL, {"policy_kwargs": {"activation_fn": "relu"}}, "policy_kwargs: activation_fn must be a subclass of torch.nn"),
    (CPQL, {"policy_kwargs": {"activation_fn": th.nn.ReLU()}}, "policy_kwargs: activation_fn must be a subclass of torch.nn"),
    (CPQL, {"policy_kwargs": {"optimizer_class": "adam"}}, "policy_kwargs: optimizer_class must be a subclass"),
    (CPQL, {"policy_kwargs": {"model_kwargs": 3}}, "policy_kwargs: model_kwargs must be a dict"),
    (CPQL, {"policy_kwargs": [1]}, r"policy_kwargs must be a dict or None, got \[1\]"),
    (CPQL, {"action_noise": 0.1}, "action_noise must be an ActionNoise .* or None, got 0.1"),
    (CPQL, {"replay_buffer_class": "her"}, "replay_buffer_class must be a subclass of .*ReplayBuffer"),
    (CPQL, {"replay_buffer_class": lambda *args: None}, "replay_buffer_class must be a subclass of .*ReplayBuffer"),
    (CPQL, {"precision": 16}, r"precision must be one of \('float32', 'bf16'\), got 16"),
    (ConsistencyBC, {"pretrain_steps": 5}, r"pretrain_steps must be 0, got 5: ConsistencyBC learns offline only"),
    (CPQL, {"dataset_kwargs": {"top_frac": 0.1}}, r"dataset_kwargs: unknown 'top_frac'; did you mean 'top_fraction'\?"),
    (CPQL, {"train_freq": "episode"}, r"train_freq must be a number of steps, or \(n, 'step'\)"),
    (CPQL, {"train_freq": (1, "day")}, r"train_freq must be a number of steps, or \(n, 'step'\)"),
    (ConsistencyBC, {"n_candidates": 5}, "unexpected argument 'n_candidates'; it belongs to CPQL, ConsistencyAC, DiffusionQL"),
    (ConsistencyBC, {"plan_of": "states"}, "unexpected argument 'plan_of'; it belongs to RACTD"),
    (CPQL, {"noise_scale": 1.0}, r"it goes into policy_kwargs=dict\(noise_scale=...\)"),
    (CPQL, {"lerning_rate": 1.0}, r"unexpected argument 'lerning_rate'; did you mean 'learning_rate'\?"),
    (CPQL, {"policy": "MLPPolicy"}, r"policy: unknown 'MLPPolicy'; did you mean 'MlpPolicy'\? known: MlpPolicy, CnnPolicy"),
    (CPQL, {"policy": "MultiInputPolicy"}, r"policy: MultiInputPolicy needs Dict observations, got Box.*use MlpPolicy"),
    (CPQL, {"policy": SACPolicy}, "policy: .*SACPolicy.* is none of MlpPolicy, CnnPolicy, MultiInputPolicy"),
]


@pytest.mark.parametrize(("cls", "kwargs", "message"), MISPLACED)
def test_what_is_misspelt_or_misplaced_is_told_where_it_belongs(cls, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**{"policy": "MlpPolicy", "env": box_env(), **SMALL, **kwargs})


def test_policy_kwargs_that_an_own_policy_takes_are_left_to_it():
    class OwnPolicy(GenerativePolicy):
        def __init__(self, *args, **kwargs):
            self.own = kwargs.pop("own")
            super().__init__(*args, **kwargs)

    assert CPQL(OwnPolicy, box_env(), **{**SMALL, "policy_kwargs": {"own": 3}}).policy.own == 3


@every
@pytest.mark.parametrize(("n", "error"), [(10.5, TypeError), ("10", TypeError), (True, TypeError), (-1, ValueError)])
def test_numbers_of_steps_are_whole(cls, n, error):
    model = cls("MlpPolicy", box_env(), dataset="no/such-v0", **SMALL)
    with pytest.raises(error, match="total_timesteps must be"):
        model.learn(n)
    with pytest.raises(error, match="gradient_steps must be"):
        model.pretrain(n)
    model.dataset = None
    model.load_dataset(make_arrays())
    assert model.pretrain(np.float64(1e0)).n_updates == 1 and type(model.run.call[1]["gradient_steps"]) is int
    model.learn(2e0)
    assert model.num_timesteps == 2


@every
def test_flags_are_true_or_false(cls):
    with pytest.raises(TypeError, match="keep_offline must be True or False, got 'no'"):
        make(cls, keep_offline="no")
    with pytest.raises(TypeError, match="cosine_lr_decay must be True, False or None, got 'no'"):
        make(cls, cosine_lr_decay="no")
    with pytest.raises(TypeError, match="compile must be True or False, got None"):
        make(cls, compile=None)


@pytest.fixture(scope="module")
def cpql_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cpql.zip"
    CPQL("MlpPolicy", box_env(), **SMALL).save(path)
    return path


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_candidates": 0},
        {"candidate_selection": "x"},
        {"candidate_temperature": 0},
        {"actor_q": "x"},
        {"target_policy": "x"},
        {"value_mode": "x"},
        {"value_critic": "x"},
        {"expectile": 1.0},
        {"alpha": -1},
        {"bc_loss": "x"},
        {"metric": "x"},
        {"sampling_steps": 0},
        {"train_sampling_steps": 0},
        {"consistency_ema_decay": 2},
        {"actor_ema_decay": -1},
        {"max_grad_norm": 0},
        {"offline_fraction": 1.5},
        {"pretrain_steps": -1},
        {"batch_size": -3},
        {"precision": "bf17"},
        {"on_divergence": "Stop"},
        {"compile": "no"},
        {"learning_rate": "x"},
        {"stats_window_size": 0},
    ],
)
def test_bad_hyperparameters_name_themselves(kwargs, cpql_file):
    name = next(iter(kwargs))
    with pytest.raises((ValueError, TypeError), match=name):
        CPQL("MlpPolicy", box_env(), **{**SMALL, **kwargs})
    with pytest.raises(ValueError, match=rf"load\(\): the argument {name}=.*does not fit .*cpql.zip: {name}"):
        CPQL.load(cpql_file, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bc_loss": "distill"}, "bc_loss='distill' does not fit .*networks would not be those"),
        ({"value_mode": "iql"}, "value_mode='iql' does not fit .*networks would not be those"),
        ({"target_policy": "current", "seed": 1}, "arguments target_policy='current', seed=1 do not fit"),
        ({"device": "gpu"}, "device='gpu' does not fit"),
    ],
)
def test_what_does_not_fit_a_sound_file_is_not_called_damage(kwargs, message, cpql_file):
    with pytest.raises(ValueError, match=message) as refused:
        CPQL.load(cpql_file, **kwargs)
    assert not isinstance(refused.value, ModelFileError)


def test_parameters_of_one_teacher_are_not_taken_for_anothers(tmp_path):
    models = {teacher: loaded(CPQL, bc_loss="distill", distill_teacher=teacher) for teacher in TEACHERS}
    for (own, model), other in zip(models.items(), reversed(TEACHERS), strict=True):
        model.save(tmp_path / own)
        assert CPQL.load(tmp_path / own).distill_teacher == own
        with pytest.raises(ValueError, match=rf"distill_teacher='{other}' does not fit .*networks would not be those"):
            CPQL.load(tmp_path / own, distill_teacher=other)
        with pytest.raises(RuntimeError, match=r"teacher\.model\.sigmas"):
            model.set_parameters(models[other].get_parameters())


def test_on_divergence_is_checked():
    with pytest.raises(ValueError, match="on_divergence must be one of"):
        loaded(CPQL, on_divergence="ignore")


def test_what_sb3_accepts_elsewhere_is_not_in_the_way(models):
    model = models[CPQL]
    model.gamma = 1.5  # SB3's own, unchecked as in SB3
    try:
        model.n_candidates = 7
        assert model.n_candidates == 7
    finally:
        model.gamma, model.n_candidates = 0.99, 50
