"""A planner's options train and survive saving; wrong ones are told."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from sb3_consistency import RACTD
from sb3_consistency.generative.edm import EDMModel
from sb3_consistency.generative.temporal import (
    TemporalMlp,
    TemporalUnet,
)
from sb3_consistency.generative.trajectory import TrajectoryConsistencyModel
from tests.conftest import SMALL, assert_same, box_env, make_planner


def test_networks_tell_bad_shapes():
    with pytest.raises(ValueError, match="horizon must be a multiple of 4"):
        TemporalUnet((10, 2), 3)
    with pytest.raises(ValueError, match="net_arch"):
        TemporalUnet((8, 2), 3, net_arch=[])
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        TemporalUnet((8, 2), 3, net_arch=[4], kernel_size=4)
    with pytest.raises(ValueError, match="network"):
        EDMModel((8, 2), 3, network="x")
    x, cond, level = th.randn(4, 8, 2), th.randn(4, 3), th.zeros(1)
    for network in (TemporalUnet((8, 2), 3, net_arch=[12, 20], n_levels=2), TemporalMlp((8, 2), 3, net_arch=[], n_levels=2)):
        assert network.eval()(x, cond, level, level).shape == x.shape


@pytest.mark.parametrize(
    "kwargs",
    [
        {"metric": "x"},
        {"n_levels": 1},
        {"sigma_min": 90},
        {"initial_noise_scale": 0},
        {"sampling_steps": 0},
        {"ctm_gamma": 2},
        {"dsm_target": "x"},
        {"distillation_metric": "x"},
    ],
)
def test_bad_options_of_the_student_name_themselves(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        TrajectoryConsistencyModel((4, 2), 1, **kwargs)


OPTIONS = [
    {"reward_input": "denoised", "reward_horizon": 16},
    {"reward_weight": 0.0, "reward_steps": 0},
    {"distill_from": "ema", "alpha": 0.5, "beta": 2.0},
    {"sampling_steps": 4},
    {"pad": False, "horizon": 8},
    {"history": 3, "executed_steps": 4},
    {"cosine_lr_decay": False, "warmup_steps": 0, "actor_learning_rate": 1e-4, "max_grad_norm": 1.0},
    {"policy_kwargs": {"network": "unet", "net_arch": [16, 32, 48], "dropout": 0.2}},
    {"policy_kwargs": {"net_arch": {"pi": [16], "qf": [8]}, "activation_fn": nn.ReLU, "optimizer_class": th.optim.Adam}},
    {"policy_kwargs": {"model_kwargs": {"metric": "pseudo_huber_squared", "initial_noise_scale": 1.0, "n_levels": 20}}},
    {"policy_kwargs": {"student_kwargs": {"ctm_gamma": 0.0, "dsm_target": "denoiser"}}, "sampling_steps": 2},
]


@pytest.mark.parametrize("kwargs", OPTIONS)
def test_every_option_trains_and_survives_saving(kwargs, tmp_path):
    model = make_planner(**kwargs).pretrain(8)
    model.save(tmp_path / "model")
    loaded = RACTD.load(tmp_path / "model")
    assert_same(model, loaded)
    assert all(th.isfinite(p).all() for p in model.policy.parameters())
    assert len(model.plan(np.zeros((5, 3), np.float32))[0]) == model.horizon


@pytest.mark.parametrize(
    "kwargs",
    [
        {"plan_of": "x"},
        {"horizon": 0},
        {"history": 0},
        {"stride": 0},
        {"stride": 2},
        {"executed_steps": 17},
        {"executed_steps": 0},
        {"teacher_steps": 1.5},
        {"reward_steps": -1},
        {"teacher_steps": 0},
        {"reward_steps": 0},
        {"teacher_steps": 0.9, "reward_steps": 0.1},
        {"warmup_steps": -1},
        {"alpha": -1},
        {"reward_weight": -0.5},
        {"reward_input": "x"},
        {"reward_horizon": 17},
        {"distill_from": "x"},
        {"n_steps": 3},
        {"replay_buffer_class": HerReplayBuffer},
        {"sampling_steps": 0},
        {"plan_of": "states"},
    ],
)
def test_bad_hyperparameters_name_themselves(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        RACTD("MlpPolicy", box_env(), **SMALL, **kwargs)
