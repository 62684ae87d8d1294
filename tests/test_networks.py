"""Networks: architectures, optimizers, extractors of one's own, what is frozen or replaced."""

from functools import partial

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_consistency import CPQL, RACTD, ConsistencyBC
from sb3_consistency.generative.consistency import squared_error
from sb3_consistency.generative.diffusion import DiffusionModel
from sb3_consistency.policies.modules import GenerativeActor, Network
from tests.conftest import ACTOR_CRITICS, actor_critics, assert_same, every, loaded, make, make_arrays, trained

OBS = np.zeros((4, 3), np.float32)


@every
@pytest.mark.parametrize("net_arch", [[4], [4, 4], {"pi": [4], "qf": [5]}])
def test_architectures_optimizers_and_schedules(cls, net_arch):
    kwargs = {"net_arch": net_arch, "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.9}}
    model = trained(cls, policy_kwargs={**kwargs, "activation_fn": nn.ELU}, learning_rate=lambda progress: 1e-3 * progress)
    for name in model.policy.trained_networks():
        optimizer = getattr(model.policy, name).optimizer
        assert type(optimizer) is th.optim.RMSprop and optimizer.param_groups[0]["alpha"] == 0.9
    assert any(isinstance(m, nn.ELU) for m in model.policy.actor.modules())


def test_an_optimizers_argument_leaves_a_planners_others():
    def of_student(**optimizer_kwargs):
        model = make(RACTD, policy_kwargs={"net_arch": [4], "optimizer_kwargs": optimizer_kwargs})
        return model.policy.student.optimizer.defaults

    assert of_student(eps=1e-5)["betas"] == (0.95, 0.999) and of_student(betas=(0.8, 0.9))["betas"] == (0.8, 0.9)


def test_candidates_of_an_algorithm_without_critics():
    model = make(ConsistencyBC, policy_kwargs={"net_arch": [4], "n_candidates": None})
    assert model.predict(OBS)[0].shape == (4, 1)


def test_network_arguments_join_the_architecture():
    kwargs = {"net_arch": [16, 16], "network": "ln_resnet", "model_kwargs": {"network_kwargs": {"dropout": 0.0}}}
    layers = make(CPQL, policy_kwargs=kwargs).actor.model.network.layers
    assert layers[0].out_features == 16 and layers[2].layers[0].p == 0.0


@actor_critics
def test_layer_norm_is_on_by_default_and_can_be_switched_off(cls):
    def norms(model):
        return [m for m in model.critic.modules() if type(m).__name__ == "StackedLayerNorm"]

    assert len(norms(make(cls))) == 2
    assert not norms(make(cls, policy_kwargs={"layer_norm": False}))


def test_a_function_may_make_the_extractor(tmp_path):
    kwargs = {"net_arch": [32], "features_extractor_class": partial(FlattenExtractor)}
    model = make(CPQL, policy_kwargs=kwargs).pretrain(2)
    model.save(tmp_path / "model")
    assert_same(model, CPQL.load(tmp_path / "model"))


class BatchNormExtractor(BaseFeaturesExtractor):
    """Remembers in which mode it was called."""

    def __init__(self, observation_space, features_dim=6):
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(nn.Linear(3, features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5))

    def forward(self, observations):
        return self.layers(observations)


BATCH_NORM = {
    "features_extractor_class": BatchNormExtractor,
    "features_extractor_kwargs": {"features_dim": 4},
    "net_arch": [16],
}


@every
@pytest.mark.parametrize("shared", [False, True])
def test_own_extractor_with_batch_norm(cls, shared, tmp_path):
    if cls is RACTD and shared:
        pytest.skip("the networks of a planner share no extractor")
    model = make(cls, policy_kwargs={**BATCH_NORM, **({"share_features_extractor": True} if shared else {})})
    norm = model.policy.actor.features_extractor.layers[1]
    untrained = norm.running_mean.clone()
    model.pretrain(8)
    assert not th.equal(norm.running_mean, untrained)
    before = norm.running_mean.clone()
    first, second = (model.predict(OBS, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)  # neither dropout nor new statistics
    assert th.equal(norm.running_mean, before) and not model.policy.training
    for network, target in model.policy.target_pairs():
        if cls is not RACTD:  # whose teacher is not in training any more
            assert th.equal(_statistics(network), _statistics(target))
        assert not target.training
    model.save(tmp_path / "model")
    assert_same(model, cls.load(tmp_path / "model"))


def _statistics(network):
    return network.features_extractor.layers[1].running_mean


@actor_critics
def test_statistics_stay_while_experience_is_collected(cls):
    model = make(cls, policy_kwargs=BATCH_NORM).pretrain(2)
    model.gradient_steps = 0
    before = _statistics(model.actor).clone()
    model.learn(20)
    assert th.equal(_statistics(model.actor), before)
    model.gradient_steps = 1
    model.learn(5)
    assert not th.equal(_statistics(model.actor), before)


@pytest.mark.parametrize("cls", ACTOR_CRITICS)
def test_layers_replaced_with_their_optimizer_are_trained(cls):
    model = loaded(cls).pretrain(1)
    model.actor.model.network.layers[-1] = th.nn.Linear(32, 1)
    model.actor.optimizer = th.optim.Adam(model.actor.parameters(), 1e-3)
    before = model.actor.model.network.layers[-1].weight.clone()
    model.pretrain(1)
    assert not th.equal(before, model.actor.model.network.layers[-1].weight)
    # and followed
    model.actor_ema_decay = 0.0
    model.pretrain(1)
    assert th.equal(*(actor.model.network.layers[-1].weight for actor in (model.actor, model.actor_target)))


class FrozenExtractor(BaseFeaturesExtractor):
    """A pretrained encoder, say, and what is learned on top of it."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 4)
        self.encoder, self.head = th.nn.Linear(3, 8), th.nn.Linear(8, 4)
        self.encoder.requires_grad_(False)

    def forward(self, observations):
        return self.head(self.encoder(observations).relu())


@every
def test_frozen_parameters_stay_as_they_are(cls):
    one_stage = {"teacher_steps": 100, "reward_steps": 1} if cls is RACTD else {}
    model = loaded(cls, policy_kwargs={"net_arch": [32, 32], "features_extractor_class": FrozenExtractor}, **one_stage)
    model.pretrain(2)
    network = getattr(model.policy, next(iter(model.losses())))
    extractor = next(module for module in network.modules() if isinstance(module, FrozenExtractor))
    extractor.head.bias.requires_grad_(False)
    before = [x.clone() for x in (extractor.encoder.weight, extractor.head.bias, extractor.head.weight)]
    model.pretrain(3)
    after = extractor.encoder.weight, extractor.head.bias, extractor.head.weight
    assert [th.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, False]


class Distilled(CPQL):
    """A second actor, with another class of model, clones the data; the one that acts learns from it."""

    cloning_network = "teacher"

    def networks(self):
        return {**super().networks(), "teacher": Network(GenerativeActor, {"model_class": DiffusionModel, "model_kwargs": {}})}

    def losses(self):
        return {"teacher": self.teacher_loss, **super().losses()}

    def teacher_loss(self, batch):
        teacher = self.policy.teacher
        return teacher.bc_loss(teacher.features(batch.observations), batch.actions).mean(), {}

    def actor_loss(self, batch):
        with th.no_grad():
            wanted = self.policy.teacher.sample(self.policy.teacher.features(batch.observations))
        drawn = self.policy.actor.sample(self.policy.actor.features(batch.observations))
        return squared_error(drawn, wanted).mean(), {}


def test_a_teacher_beside_the_actor(tmp_path):
    # sigma_max is an argument of the acting model alone
    kwargs = {"net_arch": [32], "model_kwargs": {"sigma_max": 20.0}}
    model = make(Distilled, actor_learning_rate=1e-3, learning_rate=1e-4, cosine_lr_decay=False, policy_kwargs=kwargs)
    model.load_dataset(make_arrays(), heldout_fraction=0.3)
    before = model.data.heldout_loss()
    with th.no_grad():
        model.actor.model.network.layers[-1].bias.add_(1)
    assert model.data.heldout_loss() == before, "the held-out episodes are the teacher's"
    model.pretrain(2)
    assert model.data.heldout_loss() != before
    rates = {name: getattr(model, name).optimizer.param_groups[0]["lr"] for name in model.policy.trained_networks()}
    assert rates == {"actor": 1e-3, "critic": 1e-4, "teacher": 1e-3}
    model.save(tmp_path / "model")
    assert_same(model, Distilled.load(tmp_path / "model"))
