"""Online from scratch: noise is carried to actions at a cost, and a temperature weighs it against the values."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

from sb3_consistency import CPQL, ConsistencyAC, DiffusionQL
from sb3_consistency.generative.consistency import ConsistencyModel
from sb3_consistency.generative.exploration import ExploringModel, pair_cost, pair_entropy
from sb3_consistency.values.losses import temperature_gradient
from tests.conftest import SMALL, loaded, make_arrays

pytestmark = pytest.mark.filterwarnings("ignore:.*Box.*precision.*")
with_temperature = pytest.mark.parametrize("cls", [CPQL, ConsistencyAC])


def online_model(cls=CPQL, env="Pendulum-v1", **kwargs):
    return cls("MlpPolicy", env, **{**SMALL, "learning_starts": 10, **kwargs})


def model_of_actions(form="transport", **kwargs):
    th.manual_seed(0)
    return ExploringModel(2, 3, network_kwargs={"net_arch": [16]}, form=form, exploration="gaussian", **kwargs)


def test_actions_follow_from_the_network():
    model, noise, cond = model_of_actions(), 3 * th.randn(5, 2), th.randn(5, 3)
    ends, moved = model.carry(noise, cond)
    z = noise.clamp(-1, 1)
    velocity = model.network(z, th.full((5,), math.log(model.sigma_max)), cond)
    th.testing.assert_close(ends, z + velocity)
    th.testing.assert_close(model.sample(noise[None], cond), th.tanh(ends))
    th.testing.assert_close(moved, velocity)


def test_two_moves_tell_the_cost_of_a_transport():
    moves, others = (
        th.randn(400_000, 2, generator=th.Generator().manual_seed(i)) * 0.5 + th.tensor([1.0, -2.0]) for i in (0, 1)
    )
    assert pair_cost(moves, others, 0).mean() == pytest.approx(0.25, abs=0.01)  # half the variance
    assert pair_cost(moves, others, 1).mean() == pytest.approx(float(0.5 * moves.square().sum(1).mean()), abs=0.02)
    assert pair_cost(moves, moves, 0).eq(0).all()
    th.testing.assert_close(pair_cost(moves, moves, 1), 0.5 * moves.square().sum(1, keepdim=True))


@pytest.mark.parametrize("shift_cost", [0.0, 1.0])
def test_the_gradient_of_the_cost_needs_one_of_the_two(shift_cost):
    """Twice it is that of the whole, which is what the actor's loss says."""
    noise = th.randn(400_000, 2, generator=th.Generator().manual_seed(0)).unflatten(0, (2, -1))
    gradients = []
    for whole in (True, False):
        scale, shift = (th.tensor([x, -x], requires_grad=True) for x in (0.3, 2.0))
        moves, others = scale * noise + shift
        cost = pair_cost(moves, others if whole else others.detach(), shift_cost).mean() * (1 if whole else 2)
        gradients.append(th.cat(th.autograd.grad(cost, (scale, shift), allow_unused=True)))
    th.testing.assert_close(*gradients, atol=0.02, rtol=0.02)


def test_a_transport_takes_one_pass_however_many_it_would_take_as_a_consistency_model():
    noise, cond = th.randn(3, 5, 2), th.randn(5, 3)
    model = model_of_actions(sampling_steps=3)
    assert model.noise_shape(5) == model.noise_shape(5, 3) == (1, 5, 2)
    assert th.equal(model.sample(noise, cond), model.carry(noise[0], cond)[0].tanh())
    assert model_of_actions("plain", sampling_steps=3).noise_shape(5) == (3, 5, 2)


def test_noise_has_a_path_to_the_action():
    """At sigma_max a consistency model's c_skip leaves none: what the spread of a new policy's actions shows."""
    noise, cond = th.randn(1, 1000, 2), th.zeros(1000, 3)
    assert model_of_actions().sample(noise, cond).std() > 0.3
    assert model_of_actions("plain").sample(noise, cond).std() < 0.05


def test_distances_of_pairs_tell_the_entropy_of_a_gaussian():
    std = th.tensor([0.02, 0.1, 0.5])
    actions, others = (std * th.randn(200_000, 3, generator=th.Generator().manual_seed(i)) for i in range(2))
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    # no distance counts as less than 0.001: a little above
    assert pair_entropy(actions, others).mean() == pytest.approx(float(entropy), abs=0.1)
    # a second way adds to it; actions that are all one have the least there is, and no infinity
    sides = th.tensor([-0.5, 0.5])[th.arange(200_000) % 2, None]
    assert pair_entropy(actions + sides, others + sides[th.randperm(200_000)]).mean() > entropy
    assert pair_entropy(actions, actions).isfinite().all()


def test_the_temperature_moves_towards_the_target_entropy():
    log_temperature = th.zeros(1, requires_grad=True)
    entropy, target = th.tensor(-2.5), -1.0
    (expected,) = th.autograd.grad((log_temperature * (entropy - target)).sum(), log_temperature)
    assert temperature_gradient(entropy, target) == expected
    assert temperature_gradient(th.tensor(float("nan")), target) == 0

    assert online_model().entropy_aim == SAC("MlpPolicy", "Pendulum-v1").target_entropy
    model = online_model(target_entropy=2.0).learn(40)
    assert model.log_ent_coef > 0  # it is below: the temperature grows
    model = online_model(target_entropy=-20).learn(40)
    assert model.log_ent_coef < 0


@pytest.mark.parametrize("shift_cost", [0.0, 1.0])
def test_a_transport_that_explores_tells_its_cost_and_entropy(shift_cost):
    model, noise, cond = model_of_actions(), th.randn(2, 5, 2), th.randn(5, 3)
    (ends, moves), (other_ends, others) = (model.carry(z, cond) for z in noise)
    actions, cost, entropy = model.explore(noise, cond, shift_cost)
    th.testing.assert_close(actions, ends.tanh())
    th.testing.assert_close(cost, pair_cost(moves, others, shift_cost))
    th.testing.assert_close(entropy, pair_entropy(ends, other_ends))
    # by way of one of the two noises alone, so twice
    weight = model.network.layers[0].weight
    (gradient,) = th.autograd.grad(cost.sum(), weight)
    (expected,) = th.autograd.grad(2 * pair_cost(moves, others.detach(), shift_cost).sum(), weight)
    th.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "kwargs", [{"exploration": "gaussian"}, *({"exploration": "transport", "shift_cost": x} for x in (0.0, 1.0))]
)
def test_the_target_pays_for_the_next_action(kwargs):
    model = online_model(ent_coef=0.25, **kwargs).learn(20)
    batch = next(model.batches(1, 16))
    model.prepare_step()
    th.manual_seed(3)
    value = model.next_value(batch)
    th.manual_seed(3)
    actions, cost, _ = model.actor.explore(model.actor.features(batch.next_observations), model.shift_cost)
    expected = model.critic_target(batch.next_observations, actions).amin(1, keepdim=True) - 0.25 * cost
    th.testing.assert_close(value, expected)
    assert cost.abs().min() > 0


def spread_model(form):
    """One whose standard deviation depends on the state."""
    model = model_of_actions(form)
    th.nn.init.normal_(model.log_std[-1].weight, std=0.1)
    return model.requires_grad_(False)


def test_entropy_of_noise_that_is_squashed_is_sacs():
    model, n = spread_model("squashed"), 200_000
    noise, cond = th.randn(2, n, 2), th.tensor([[0.5, -1.0, 2.0]])
    noise[0] = noise[0, :1]  # one z
    actions, cost, entropy = model.explore(noise, cond.expand(n, -1), 1.0)
    theirs = SquashedDiagGaussianDistribution(2)
    theirs.proba_distribution(model.denoise(noise[:1, :1], cond), model.log_std(cond))
    assert entropy.mean() == pytest.approx(float(-theirs.log_prob(actions).mean()), abs=0.01)
    th.testing.assert_close(cost, -entropy)
    th.testing.assert_close(actions, model.sample(noise, cond.expand(n, -1)))


def test_noise_that_is_added_after_an_offline_phase_keeps_the_action():
    model, cond = spread_model("added"), th.randn(5, 3)
    noise = th.randn(2, 5, 2)
    plain = ConsistencyModel.sample(model, noise[:1], cond)
    actions, cost, entropy = model.explore(noise, cond, 1.0)
    std = model.log_std[-1].bias.exp().expand(5, 2)
    th.testing.assert_close(actions, (plain + std * noise[1]).clamp(-1, 1))
    th.testing.assert_close(entropy[:, 0], th.distributions.Normal(plain, std).entropy().sum(1))
    th.testing.assert_close(cost, -entropy)
    th.testing.assert_close(model.denoise(noise[:1], cond), plain)
    model.log_std.requires_grad_(True)
    assert not model.spread(plain.detach(), noise[1], cond).actions.requires_grad
    model.start_spread(-1.0)
    th.testing.assert_close(model.explore(noise, cond, 1.0).entropy, th.full((5, 1), -2.0))


@with_temperature
def test_an_offline_policy_goes_online_with_noise(cls, tmp_path):
    model = loaded(cls, env="Pendulum-v1", exploration="gaussian", learning_starts=10)
    model.pretrain(5)
    obs = np.ones((4, 3), np.float32)
    before = model.predict(obs, deterministic=True)[0]
    model._begin_to_explore()
    np.testing.assert_array_equal(before, model.predict(obs, deterministic=True)[0])
    added = math.exp(-1) / math.sqrt(2 * math.pi * math.e)  # of an entropy of -1
    std, of_z = model.actor.action_stds(th.ones(4, 3))
    assert std == pytest.approx(math.hypot(added, of_z), rel=0.2)
    model.learn(300)
    # neither the temperature nor flat critics let it grow
    for networks in (model.actor, model.actor_target):
        th.testing.assert_close(networks.model.log_std(networks.features(th.ones(4, 3))), th.full((4, 1), math.log(added)))
        _, _, entropy = networks.explore(networks.features(th.ones(4, 3)), 1.0)
        th.testing.assert_close(entropy, th.full((4, 1), -1.0))
    # the reference stays, and Q in its units
    told = model.logger.name_to_value
    assert model.step_alpha == 1 and abs(told["train/q_loss"]) == pytest.approx(1, abs=0.5)
    assert "train/bc_loss" in told and "train/ent_coef" not in told
    # it is that of target_entropy, also where that is told later
    model.target_entropy = 0.0
    wider = [model, loaded(cls, env="Pendulum-v1", exploration="gaussian", target_entropy=0.0)]
    wider[1].pretrain(1)
    wider[1]._begin_to_explore()
    model.target_entropy = -1.0
    model.save(tmp_path / "model")
    model.target_entropy = 0.0
    wider.append(cls.load(tmp_path / "model", env=model.env, target_entropy=0.0).learn(1))
    for each in wider:
        _, _, entropy = each.actor.explore(each.actor.features(th.ones(4, 3)), 1.0)
        th.testing.assert_close(entropy, th.zeros(4, 1), atol=1e-6, rtol=0)
        std, of_z = each.actor.action_stds(th.zeros(4, 3))
        assert math.sqrt(std**2 - of_z**2) == pytest.approx(math.e * added, rel=0.2)


@with_temperature
@pytest.mark.parametrize(
    ("exploration", "from_scratch", "afterwards"),
    [("gaussian", "squashed", "added"), ("transport", "transport", "added"), ("none", "transport", "plain")],
)
def test_the_first_gradient_step_decides_on_the_kind_of_policy(cls, exploration, from_scratch, afterwards, tmp_path):
    obs = np.zeros((4, 3), np.float32)
    scratch = online_model(cls, exploration=exploration).learn(20)
    offline = loaded(cls, env="Pendulum-v1", exploration=exploration)
    assert offline.actor.model.form == "plain"
    offline.pretrain(3)
    assert offline.actor.model.form == "plain"
    offline.learn(20)
    forms = (from_scratch, afterwards)
    assert (scratch.actor.model.form, offline.actor.model.form) == forms
    scratch.load_dataset(make_arrays())
    scratch.pretrain(2)
    assert scratch.actor.model.form == from_scratch
    for model in (scratch, offline):
        model.save(tmp_path / "model")
        model.save_safe(tmp_path / "model")
        for back in (cls.load(tmp_path / "model"), cls.load_safe(tmp_path / "model")):
            assert back.actor.model.form == back.actor_target.model.form == model.actor.model.form
            np.testing.assert_array_equal(*(m.predict(obs, deterministic=True)[0] for m in (model, back)))
            assert th.equal(back.ent_coef_tensor, model.ent_coef_tensor)


@pytest.mark.parametrize("exploration", ["gaussian", "transport"])
def test_a_policy_that_is_saved_alone_acts_as_it_did(exploration, tmp_path):
    obs = np.ones((4, 3), np.float32)
    scratch = online_model(exploration=exploration).learn(20)
    offline = loaded(CPQL, env="Pendulum-v1", exploration=exploration, bc_loss="distill", distill_teacher="consistency")
    offline.pretrain(3)
    offline.learn(20)
    for model in (scratch, offline):
        for saved in (model.policy, model.actor):
            saved.save(tmp_path / "saved")
            back = type(saved).load(tmp_path / "saved")
            for deterministic in (True, False):
                actions = []
                for policy in (saved, back):
                    th.manual_seed(0)
                    actions.append(policy.predict(obs, deterministic=deterministic)[0])
                np.testing.assert_array_equal(*actions)
    assert offline.teacher.model.form == "plain" and not offline.teacher.model.explores
    with pytest.raises(TypeError, match="CPQL sets form"):
        online_model(policy_kwargs={"model_kwargs": {"form": "plain"}})


@with_temperature
def test_without_a_temperature_it_is_the_policy_of_the_offline_phase(cls):
    model = online_model(cls, ent_coef=0, alpha=0.05).learn(20)
    assert model.actor.model.form == "plain" and model.log_ent_coef is None
    assert model.step_alpha == pytest.approx(0.05)


def test_a_weight_that_counts_for_nothing_is_told():
    for name, value in {"alpha": 0.05, "max_q_backup": True, "train_sampling_steps": 2}.items():
        with pytest.warns(UserWarning, match=rf"{name}={value} has no effect.*ent_coef=0"):
            online_model(**{name: value}).learn(20)


@pytest.mark.parametrize("cosine_lr_decay", [False, True])
def test_the_temperature_has_the_critics_learning_rate(cosine_lr_decay):
    model = online_model(cosine_lr_decay=cosine_lr_decay, exploration="gaussian").learn(40)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in (model.critic.optimizer, model.ent_coef_optimizer)]
    assert rates[0] == rates[1] and (rates[0] < 1e-4) == cosine_lr_decay


@with_temperature
def test_a_temperature_is_kept_as_sacs_is(cls, tmp_path):
    model = online_model(cls, ent_coef="auto_0.1").learn(30)
    assert 0.05 < model.ent_coef_tensor < 0.2
    theirs = SAC("MlpPolicy", "Pendulum-v1").get_parameters()
    assert "ent_coef_optimizer" in theirs.keys() & model.get_parameters().keys()
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model")
    assert th.equal(model.ent_coef_tensor, cls.load(tmp_path / "model").ent_coef_tensor)
    for back in (cls.load(tmp_path / "model", env="Pendulum-v1"), cls.load_safe(tmp_path / "model", env="Pendulum-v1")):
        before = back.log_ent_coef.clone()
        assert back.ent_coef_optimizer.state_dict()["state"] == model.ent_coef_optimizer.state_dict()["state"]
        back.learn(30)
        assert not th.equal(before, back.log_ent_coef)
    fixed = online_model(cls, ent_coef=0.01).learn(20)
    assert fixed.log_ent_coef is None and fixed.ent_coef_tensor == pytest.approx(0.01)


@pytest.mark.parametrize("value", ["automatic", "auto_", "auto_-1", "auto_x", "auto_inf", -0.5, float("nan"), True, None])
def test_a_wrong_temperature_is_refused(value):
    with pytest.raises((ValueError, TypeError), match="ent_coef must be"):
        online_model(ent_coef=value)


@pytest.mark.parametrize("value", ["automatic", float("nan"), -math.inf, math.inf])
def test_a_wrong_target_entropy_is_refused(value):
    with pytest.raises((ValueError, TypeError), match="target_entropy must be"):
        online_model(target_entropy=value)


def test_one_candidate_is_drawn_where_the_temperature_explores():
    model, offline = online_model(), loaded(CPQL)
    assert model.n_candidates is offline.n_candidates is None
    passes = []
    for m in (model, offline):
        m.actor.model.network.layers.register_forward_hook(lambda *args: None)
        m.actor.model.network.layers[0].register_forward_hook(lambda layer, inputs, out: passes.append(len(out)))
        m.predict(np.zeros((2, 3), np.float32), deterministic=False)
    assert passes == [2, 100]


@with_temperature
def test_without_a_dataset_the_networks_are_sacs(cls, tmp_path):
    model, theirs = cls("MlpPolicy", "Pendulum-v1"), SAC("MlpPolicy", "Pendulum-v1")

    def widths(model):
        return [m.out_features for m in model.actor.model.network.layers if isinstance(m, th.nn.Linear)]

    assert widths(model) == [256, 256, 1]
    assert any(isinstance(m, th.nn.ReLU) for m in model.critic.modules())
    assert type(theirs.actor.latent_pi[1]) is th.nn.ReLU
    for kwargs in ({"dataset": make_arrays()}, {"ent_coef": 0}):
        papers = cls("MlpPolicy", "Pendulum-v1" if "ent_coef" in kwargs else None, **kwargs)
        assert widths(papers) == [256, 256, 256, 1]
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model")
    obs = np.zeros((4, 3), np.float32)
    for back in (
        cls.load(tmp_path / "model"),
        cls.load_safe(tmp_path / "model"),
        cls.load(tmp_path / "model", env="Pendulum-v1"),
    ):
        np.testing.assert_array_equal(*(m.predict(obs, deterministic=True)[0] for m in (model, back)))


class DictObservation(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Dict({"state": env.observation_space})

    def observation(self, observation):
        return {"state": observation}


@with_temperature
def test_returns_of_three_steps_where_the_buffer_has_them(cls, tmp_path):
    memory = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    cases = [
        ({}, 3),
        ({"n_steps": 2}, 2),
        ({"ent_coef": 0}, 1),
        ({"dataset": make_arrays()}, 1),
        ({"horizon": 4}, 1),
        ({"replay_buffer_class": ReplayBuffer}, 1),
        (memory, 1),
    ]
    for kwargs, expected in cases:
        assert online_model(cls, **kwargs).n_steps == expected
    env = DictObservation(gym.make("Pendulum-v1"))
    assert cls("MultiInputPolicy", env, **SMALL).n_steps == 1
    for name in ("history", "horizon"):
        with pytest.raises((TypeError, ValueError), match=name):
            online_model(cls, **{name: None})
    assert DiffusionQL("MlpPolicy", "Pendulum-v1", **SMALL).n_steps == 1
    model = online_model(cls).learn(20)
    assert isinstance(model.replay_buffer, NStepReplayBuffer) and model.replay_buffer.n_steps == 3
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model")
    single = online_model(cls, n_steps=1)
    single.save(tmp_path / "single")
    for load in (cls.load, cls.load_safe):
        assert load(tmp_path / "model", env="Pendulum-v1").replay_buffer.n_steps == 3
    assert cls.load(tmp_path / "single", env="Pendulum-v1").n_steps == 1


def steps_of(network):
    return int(next(iter(network.optimizer.state.values()))["step"])


@with_temperature
@pytest.mark.parametrize(
    ("kwargs", "period"),
    [({}, 2), ({"policy_delay": 3}, 3), ({"policy_delay": 1}, 1), ({"exploration": "transport"}, 1), ({"ent_coef": 0}, 1)],
)
def test_from_scratch_the_actor_learns_at_every_second_step(cls, kwargs, period):
    model = online_model(cls, **kwargs).learn(31)
    assert (steps_of(model.critic), steps_of(model.actor)) == (model.n_updates, math.ceil(model.n_updates / period))
    model.policy_delay = None
    assert model.actor_period == (1 if kwargs.keys() & {"exploration", "ent_coef"} else 2)


@with_temperature
def test_after_data_the_actor_learns_at_every_step(cls, tmp_path):
    model = loaded(cls, env="Pendulum-v1", learning_starts=10).pretrain(5).learn(30)
    assert steps_of(model.actor) == steps_of(model.critic) == model.n_updates > 5
    model = online_model(cls)
    model.load_dataset(make_arrays(action_dim=1))  # what its first gradient step is, not what it was built for, decides
    assert steps_of(model.pretrain(5).actor) == 5
    # files of before have no such option, or a number
    model.policy_delay = 1
    model.save(tmp_path / "model")
    assert cls.load(tmp_path / "model").policy_delay == 1


@with_temperature
def test_learning_rate_from_scratch(cls, tmp_path):
    cases = [
        ({}, 1e-3),
        ({"learning_rate": 2e-4}, 2e-4),
        ({"ent_coef": 0}, 3e-4),
        ({"exploration": "transport"}, 3e-4),
        ({"dataset": make_arrays()}, 3e-4),
    ]
    for kwargs, expected in cases:
        model = online_model(cls, **kwargs)
        rates = [n.optimizer.param_groups[0]["lr"] for n in (model.actor, model.critic)]
        assert model.learning_rate == model.lr_schedule(1) == expected and rates == [expected, expected]
    assert DiffusionQL("MlpPolicy", "Pendulum-v1", **SMALL).learning_rate == 3e-4
    model.learning_rate = 1e-4
    model.save(tmp_path / "model")
    assert cls.load(tmp_path / "model").learning_rate == 1e-4
    assert online_model(cls, learning_rate=lambda progress: 0.5 * progress).lr_schedule(0.5) == 0.25


@pytest.mark.parametrize("exploration", ["gaussian", "transport"])
def test_what_is_logged_of_it(exploration):
    model = online_model(env="Pendulum-v1", learning_starts=10, exploration=exploration)
    model.learn(20)
    logged = model.logger.name_to_value
    model.train(1, 16)
    assert logged["train/ent_coef"] == pytest.approx(float(model.ent_coef_tensor), rel=1e-2)
    assert ("train/transport_cost" in logged) == (exploration == "transport") and -1 < logged["train/entropy"] < 2
    assert logged.get("train/transport_cost", 1) > 0
    state = th.get_rng_state()
    spread, of_z = model.actor.action_stds(th.zeros(100, 3))
    assert th.equal(state, th.get_rng_state()) and 0.2 < spread < 0.8
    assert of_z == spread if exploration == "transport" else of_z < 0.05


class Ring(gym.Env):
    """One step, eight modes on a ring, of which every other is worth 1, the others 0.5."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    modes = 0.8 * np.array([[math.cos(math.pi * k / 4), math.sin(math.pi * k / 4)] for k in range(8)])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        distances = ((self.modes - action) ** 2).sum(1)
        mode = int(distances.argmin())
        reward = (0.5 if mode % 2 else 1.0) * math.exp(-distances[mode] / (2 * 0.15**2))
        return np.zeros(1, np.float32), reward, True, False, {}


class TwoGoals(gym.Env):
    """A point at the origin walks eight steps; the reward is 1 less the distance to the nearer of two goals."""

    observation_space = gym.spaces.Box(-3, 3, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def observation(self):
        return np.array([*self.place, self.time / 8], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.normal(0, 0.02, 2), 0
        return self.observation(), {}

    def step(self, action):
        self.place, self.time = np.clip(self.place + 0.25 * np.clip(action, -1, 1), -2, 2), self.time + 1
        distance = min(math.hypot(self.place[0] - goal, self.place[1]) for goal in (-1, 1))
        return self.observation(), 1 - distance, self.time == 8, False, {}


def several_ways(env, steps, **options):
    kwargs = {"seed": 0, "learning_starts": 500, "policy_kwargs": {"net_arch": [64, 64]}, "device": "cpu"}
    return CPQL("MlpPolicy", env, **{**kwargs, "exploration": "transport", "n_steps": 1, **options}).learn(steps)


def shares_of_modes(model):
    """Share of sampled actions at each mode of the ring."""
    actions, _ = model.predict(np.zeros((2000, 1), np.float32), deterministic=False)
    distances = ((Ring.modes - actions[:, None]) ** 2).sum(2)
    near, mode = distances.min(1) < 0.3**2, distances.argmin(1)
    return [float((near & (mode == k)).mean()) for k in range(8)]


def shares_of_goals(model):
    """Share of episodes that end at the left goal, at the right one, and their mean return."""
    env, ends, returns = TwoGoals(), [], []
    for seed in range(200):
        obs, total = env.reset(seed=seed)[0], 0.0
        for _ in range(8):
            obs, reward, *_ = env.step(model.predict(obs, deterministic=False)[0])
            total += reward
        ends.append(obs[0])
        returns.append(total)
    return np.mean(np.array(ends) < -0.7), np.mean(np.array(ends) > 0.7), np.mean(returns)


@pytest.mark.slow
def test_every_good_mode_is_kept():
    shares = shares_of_modes(several_ways(Ring(), 10_000))
    print(shares)
    assert min(shares[::2]) >= 0.1


@pytest.mark.slow
def test_both_ways_are_used():
    left, right, mean = shares_of_goals(several_ways(TwoGoals(), 4_000))
    print(left, right, mean)
    assert min(left, right) >= 0.2 and mean > 5


@with_temperature
@pytest.mark.parametrize("exploration", ["gaussian", "transport"])
def test_deterministic_actions_from_scratch_are_those_of_the_actors_average(cls, exploration, tmp_path):
    obs = np.ones((4, 3), np.float32)
    model = online_model(cls, exploration=exploration, learning_rate=1e-2).learn(60)

    def actions_of(actor):
        with th.no_grad():
            return model.policy.unscale_action(actor(th.as_tensor(obs), deterministic=True).numpy())

    average, current = actions_of(model.actor_target), actions_of(model.actor)
    assert not np.allclose(average, current, atol=1e-3)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], average)
    exported = th.jit.load(model.export(tmp_path / "policy.pt"))
    np.testing.assert_allclose(exported(th.as_tensor(obs)).detach(), average, rtol=1e-5)
    model.deterministic_policy = "current"
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], current)
    # offline a policy settles by itself: its learning rate falls to 0
    offline = loaded(cls, env="Pendulum-v1").pretrain(5)
    expected = offline.policy.unscale_action(offline.actor(th.as_tensor(obs), deterministic=True).detach().numpy())
    np.testing.assert_array_equal(offline.predict(obs, deterministic=True)[0], expected)


def test_the_average_that_acts_from_scratch_is_of_the_last_tenth(monkeypatch):
    model, seen, step = online_model(learning_rate=1e-2), [], CPQL.gradient_step

    def gradient_step(self, batch):
        acts = self.is_actors_turn
        metrics = step(self, batch)
        seen.extend([self.actor.model.log_std[-1].bias.detach().clone()] if acts else [])
        return metrics

    monkeypatch.setattr(CPQL, "gradient_step", gradient_step)
    model.learn(110)
    assert len(seen) == 50
    weights = th.arange(1, 51).float().pow(9)
    expected = (weights / weights.sum()) @ th.stack(seen)
    th.testing.assert_close(model.actor_target.model.log_std[-1].bias, expected, rtol=0.02, atol=1e-4)
