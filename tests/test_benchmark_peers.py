"""Algorithms of other libraries in the benchmark: on our episodes, judged as ours are."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_consistency import open_dataset, record_dataset, swing_up
from sb3_consistency.benchmark import peers
from sb3_consistency.benchmark.jobs import Job, Work
from sb3_consistency.benchmark.runs import Evaluation
from sb3_consistency.benchmark.suites import jobs_of

DATA = "test/pendulum-v0"


def test_libraries_that_are_missing_or_unknown(monkeypatch):
    for name in ("d3rlpy.algos", "d3rlpy", "sbx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"d3rlpy:IQL needs .*\[peers\]"):
        jobs_of("offline", ["d3rlpy:IQL"], ["d"], [0], 10, 0)
    with pytest.raises(ImportError, match=r"sbx:SAC needs .*sbx-rl"):
        jobs_of("online", ["sbx:SAC"], ["e"], [0], 0, 10)
    with pytest.raises(ValueError, match=r"'other' in 'other:SAC' is none of .*d3rlpy"):
        jobs_of("online", ["other:SAC"], ["e"], [0], 0, 10)
    with pytest.raises(ValueError, match=r"'LayerNormTD3' is none of .*'layernormsac'"):
        jobs_of("online", ["LayerNormTD3"], ["e"], [0], 0, 10)


def test_the_control_is_sac_with_normalised_critics():
    (job,) = jobs_of("online", ["layernormsac {'policy_kwargs': {'net_arch': [16, 16, 16]}}"], ["Pendulum-v1"], [0], 0, 120)
    assert job.algo == "LayerNormSAC"
    model = peers.find_algorithm(job.algo)("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs={"net_arch": [16, 16, 16]})
    for critic in (model.critic, model.critic_target):
        for network in critic.q_networks:
            kinds = [type(layer).__name__ for layer in network]
            assert kinds == ["Linear", "LayerNorm", "ReLU"] * 3 + ["Linear"]
    assert not [layer for layer in model.actor.modules() if isinstance(layer, nn.LayerNorm)]
    norm = next(layer for layer in model.critic.modules() if isinstance(layer, nn.LayerNorm))
    before, followed = norm.bias.clone(), model.critic_target.q_networks[0][1]
    model.learn(120)
    assert not th.equal(before, norm.bias) and not th.equal(before, followed.bias)


def test_settings_of_ones_own_go_with_the_name():
    jobs = jobs_of("offline", ["cpql {'eta': 3.0}", "CPQL"], ["d"], [0], 10, 0, "{'gamma': 0.9}")
    assert [job.options for job in jobs] == ["{'gamma': 0.9, 'eta': 3.0}", "{'gamma': 0.9}"]
    nested = ["CPQL {'policy_kwargs': {'a': {'b': 3}, 'd': 4}}"]
    (job,) = jobs_of("offline", nested, ["d"], [0], 10, 0, "{'policy_kwargs': {'a': {'b': 1, 'c': 2}}}")
    assert job.options == "{'policy_kwargs': {'a': {'b': 3, 'c': 2}, 'd': 4}}"
    with pytest.raises(ValueError, match=r"--algos: \{'eta': 3\} belongs to no algorithm; name and options are one argument"):
        jobs_of("offline", ["CPQL", "{'eta': 3}"], ["d"], [0], 10, 0)
    with pytest.raises(ValueError, match="--algos"):
        jobs_of("offline", ["CPQL {'eta'"], ["d"], [0], 10, 0)


def test_penalties_of_rebrac_are_those_of_the_kind_of_data():
    told = {
        "zoo/hopper/mixed-v0": (0.05, 0.5),
        "mujoco/halfcheetah/medium-v0": (0.001, 0.01),
        "d4rl:/data/walker2d_medium_expert-v2.hdf5": (0.01, 0.01),
        "d4rl:hopper-medium-replay-v2": (0.05, 0.5),
    }
    for data, (actor_beta, critic_beta) in told.items():
        assert peers.rebrac_penalties(data) == {"actor_beta": actor_beta, "critic_beta": critic_beta}
    with pytest.warns(UserWarning, match=r"no penalties for data like 'ogbench:cube-v0', 0.01 is taken for both; try some"):
        assert peers.rebrac_penalties("ogbench:cube-v0") == {"actor_beta": 0.01, "critic_beta": 0.01}


class Fake:
    """Acts as d3rlpy's do, with its last observation."""

    class impl:
        policy = None

    def predict(self, observations):
        return np.repeat(observations[:, -1:] / 8, 1, axis=1)

    sample_action = predict


def test_actions_are_scaled_there_and_back():
    env = make_vec_env("Pendulum-v1")
    policy = peers.D3rlpyPolicy(Fake(), env)
    obs = np.array([[1, 0, 8], [1, 0, -8], [1, 0, 4], [1, 0, 80]], np.float32)
    actions, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_allclose(actions, [[2], [-2], [1], [2]])
    assert policy.predict(obs[0])[0].shape == (1,)
    for scaled in (False, True):  # a replay buffer's are
        given = actions / 2 if scaled else actions
        found = peers._scaled(given, SimpleNamespace(scaled_actions=scaled), env.action_space)
        np.testing.assert_allclose(found, [[1], [-1], [0.5], [1]])


@pytest.mark.parametrize("algo", ["TD3PlusBC", "IQL", "ReBRAC", "BC"])
def test_d3rlpys_algorithms_run_on_our_episodes(algo, minari_folder, tmp_path):
    pytest.importorskip("d3rlpy")
    record_dataset(DATA, "Pendulum-v1", swing_up(0.0, 0), 600)
    (job,) = jobs_of(
        "offline",
        [
            f"d3rlpy:{algo.lower()}",
        ][:1],
        [DATA],
        [0],
        40,
        0,
        episodes=2,
        evaluations=2,
    )
    assert job.algo == f"d3rlpy:{algo}"
    record = job.run(Work(tmp_path, 1))
    assert [point["step"] for point in record["curve"]] == [20, 40]
    assert record["curve"][-1]["return"] == record["deterministic_return"] and record["offline_seconds"] > 0
    again = job.run(Work(tmp_path, 1))
    assert again["weights"] == record["weights"] and again["deterministic_return"] == record["deterministic_return"]


def test_d3rlpys_cloning_learns_the_behaviour(minari_folder, tmp_path):
    """Were observations and actions of different steps, as its own reader gives them, or actions not scaled, it could not."""
    pytest.importorskip("d3rlpy")
    record_dataset(DATA, "Pendulum-v1", lambda obs: np.array([1.5 * obs[1]], np.float32), 1000)
    source = open_dataset(DATA)
    job = Job("offline", "d3rlpy:BC", "{'batch_size': 256, 'learning_rate': 3e-3}", DATA, 0, 300, 0, 1, 1)
    policy, _ = peers.train_d3rlpy(job, source, Evaluation(make_vec_env("Pendulum-v1"), job))
    (last,) = source.episodes([4])
    errors = policy.predict(np.asarray(last.observations), deterministic=True)[0] - last.actions
    assert np.square(errors).mean() < 0.05 * np.var(last.actions)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"actor_beta": 0.05, "critic_beta": 0.5}),
        ({"critic_beta": 0.1}, {"actor_beta": 0.05, "critic_beta": 0.1}),
        ({"actor_beta": 0.1}, {"actor_beta": 0.1, "critic_beta": 0.5}),
    ],
)
def test_penalties_are_the_authors_where_one_has_none_of_ones_own(own, expected, monkeypatch):
    for module in ("", ".models", ".optimizers", ".optimizers.lr_schedulers", ".preprocessing"):
        monkeypatch.setitem(sys.modules, f"d3rlpy{module}", MagicMock())
    job = Job("offline", "d3rlpy:ReBRAC", repr(own), "zoo/hopper/mixed-v0", 0, 10, 0, 1, 1)
    settings = {**peers.reproduction_settings(job), **own}
    assert {name: settings[name] for name in expected} == expected


def test_jax_sac_runs_online(tmp_path):
    pytest.importorskip("sbx")
    (job,) = jobs_of("online", ["sbx:sac"], ["Pendulum-v1"], [0], 0, 120, episodes=1, evaluations=2)
    record = job.run(Work(tmp_path, 1))
    assert record["algo"] == "sbx:SAC" and [point["step"] for point in record["curve"]] == [60, 120]
    assert np.isfinite(record["random_return"])
