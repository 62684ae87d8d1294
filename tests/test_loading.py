"""Datasets end up in the replay buffer as they should, or with a clear error and nothing changed."""

import pickle

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_consistency import CPQL, RACTD, ConsistencyBC
from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.formats.minari import MinariSource
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.data.record import record_dataset
from sb3_consistency.envs.wrappers import FlattenNestedDict, flatten_if_nested
from tests.conftest import SMALL, VectorEnv, make_arrays


def bc(dataset, env=None, **kwargs):
    return ConsistencyBC("MlpPolicy", env, dataset=dataset, **SMALL, **kwargs)


@pytest.fixture
def pendulum_dataset(minari_folder):
    rng = np.random.default_rng(0)
    return record_dataset(
        "test/pendulum-v0",
        gym.make("Pendulum-v1", max_episode_steps=30),
        lambda obs: rng.uniform(-2, 2, 1).astype(np.float32),
        100,
    )


def test_recorded_minari_dataset_is_aligned_to_the_last_episode(pendulum_dataset):
    model = CPQL.from_dataset("test/pendulum-v0", **SMALL)
    assert model.replay_buffer.size() == 100
    buffer = model.replay_buffer
    dataset = list(pendulum_dataset)
    assert [len(e) for e in dataset] == [30, 30, 30, 10]
    last, rows = dataset[-1], slice(90, 100)
    np.testing.assert_allclose(buffer.observations[rows, 0], last.observations[:-1], rtol=1e-6)
    np.testing.assert_allclose(buffer.next_observations[rows, 0], last.observations[1:], rtol=1e-6)
    np.testing.assert_allclose(buffer.actions[rows, 0], last.actions / 2, rtol=1e-6)
    np.testing.assert_allclose(buffer.rewards[rows, 0], last.rewards, rtol=1e-6)
    # Pendulum only times out, and the last episode was cut: all four bootstrap
    assert buffer.dones[:, 0].nonzero()[0].tolist() == [29, 59, 89, 99]
    assert (buffer.timeouts == buffer.dones).all()


def test_timeouts_bootstrap_and_terminations_do_not(arrays):
    model = bc(None, env=VectorEnv(action_space=spaces.Box(-1, 1, (1,))))
    assert model.load_dataset(arrays) == 120
    batch = model.replay_buffer._get_samples(np.array([19, 39, 10]))
    assert batch.dones.flatten().tolist() == [1.0, 0.0, 0.0]  # terminated, timed out, inside


def test_plain_arrays_are_cut_where_observations_jump(arrays):
    arrays["terminations"][:] = arrays["truncations"][:] = False
    model = bc(arrays)
    model.load_dataset(arrays)
    assert model.replay_buffer.dones[:, 0].nonzero()[0].tolist() == [19, 39, 59, 79, 99, 119]
    assert (model.replay_buffer.timeouts == model.replay_buffer.dones).all()


@pytest.mark.parametrize("n_envs", [1, 2, 7])
def test_columns_hold_contiguous_slices_that_end_truncated(arrays, n_envs):
    env = make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-1, 1, (1,))), n_envs=n_envs)
    model = CPQL("MlpPolicy", env, **SMALL)
    model.load_dataset(arrays)
    buffer = model.replay_buffer
    assert buffer.size() == -(-120 // n_envs) and (buffer.dones[-1] == 1).all()
    ids = buffer.observations[..., 0]
    assert set(ids.flatten()) == set(arrays["observations"][:, 0])  # nothing is lost
    for column in range(n_envs):
        for t in range(buffer.size() - 1):
            follows = ids[t + 1, column] == buffer.next_observations[t, column, 0]
            assert follows or buffer.dones[t, column] == 1


def test_n_step_returns_never_cross_episodes(arrays):
    model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), n_steps=3, gamma=0.5, **SMALL)
    model.load_dataset(arrays)
    batch = model.replay_buffer._get_samples(np.array([17, 18, 19, 20]))
    assert batch.rewards.flatten().tolist() == [0.0, 0.0, 0.0, 1.75]  # episode 0 pays 0 a step, episode 1 pays 1
    assert batch.discounts.flatten().tolist() == [0.125, 0.25, 0.5, 0.125]
    assert batch.dones.flatten().tolist() == [1, 1, 1, 0]


def test_filters(arrays):
    model = bc(arrays)
    assert model.load_dataset(arrays, top_fraction=0.5) == 60
    assert set(model.replay_buffer.rewards[:60, 0]) == {3.0, 4.0, 5.0}
    assert model.load_dataset(arrays, episodes=slice(1, 3)) == 40
    assert set(model.replay_buffer.rewards[:40, 0]) == {1.0, 2.0}
    assert model.load_dataset(arrays, episodes=[5]) == 20
    assert model.load_dataset(arrays, heldout_fraction=1 / 3) == 80
    assert set(model.data.heldout["observations"][:, 0] // 1000) == {0.0, 3.0}


def test_heldout_loss_is_logged_and_falls(arrays, tmp_path):
    n = len(arrays["actions"])
    arrays["actions"] = np.full((n, 1), 0.7, np.float32)
    model = bc(arrays, dataset_kwargs={"heldout_fraction": 0.3}, bc_loss="reconstruction")
    model.learn(20, log_interval=10)
    first = model.data.heldout_loss()
    assert first == model.data.heldout_loss()
    model.learn(400)
    assert model.data.heldout_loss() < 0.5 * first


def test_lists_and_weights(arrays):
    other = make_arrays(n_episodes=2, seed=1)
    model = bc(arrays)
    assert model.load_dataset([arrays, other], weights=[1, 3]) == 160
    np.random.seed(0)
    batch = next(model.batches(1, 20_000))
    # the second dataset has the rows 120 to 159, in which the rewards are 0 and 1
    share = np.isin(batch.rewards.flatten().numpy(), [2, 3, 4, 5]).mean()
    assert share == pytest.approx(0.25 * 4 / 6, abs=0.02)


def test_wrong_weights(arrays):
    model = bc(arrays)
    for weights in ([1], [0, 0], [-1, 2], [np.nan, 1], [np.inf, 1]):
        with pytest.raises(ValueError, match="weights"):
            model.load_dataset([arrays, arrays], weights=weights)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [("none", [0, 5]), ("antmaze", [-2, 18]), ("minus_one", [-1, 4]), ("iql_locomotion", [0, 50]), (lambda r: 2 * r, [0, 10])],
)
def test_reward_transforms(arrays, transform, expected):
    model = bc(arrays)
    model.load_dataset(arrays, reward_transform=transform)
    rewards = model.replay_buffer.rewards
    assert [rewards.min(), rewards.max()] == pytest.approx(expected)


def test_experience_of_before_gets_the_transform_too(arrays):
    model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), n_steps=1, **SMALL).learn(5)
    raw = model.replay_buffer.rewards[:5].copy()
    model.load_dataset(arrays, reward_transform="antmaze")
    model.learn(3, reset_num_timesteps=False)
    np.testing.assert_allclose(model.replay_buffer.rewards[:5], 4 * raw - 2)
    # the same function, from a file say
    model.load_dataset(arrays, reward_transform=lambda rewards: 4 * rewards - 2)
    model.load_dataset(arrays, reward_transform="antmaze")
    with pytest.raises(ValueError, match=r"reward_transform: .* AffineReward\(scale=4.0, shift=-2.0\) transformed"):
        model.load_dataset(arrays)
    np.testing.assert_allclose(model.replay_buffer.rewards[:5], 4 * raw - 2)
    assert model.run.reward_function is not None and model.offline_buffer.rewards.max() == 18
    model.replay_buffer.reset()
    model.load_dataset(arrays)


def test_normalized_rewards_and_the_same_transform_online(arrays):
    model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), **SMALL)
    model.load_dataset(arrays, reward_transform="normalize")
    rewards = model.replay_buffer.rewards[:, 0]
    assert rewards.mean() == pytest.approx(0, abs=1e-5) and rewards.std() == pytest.approx(1, rel=1e-4)
    raw = np.array([2.5], np.float32)
    function = model.run.reward_function
    model.learn(5)
    assert function(raw)[0] == pytest.approx(0, abs=1e-5)  # the mean reward
    # VectorEnv pays at most 0, which is below the data's mean of 2.5
    assert model.replay_buffer.rewards[:5].max() <= function(np.zeros(1))[0] + 1e-5


def test_observation_statistics_are_fitted_saved_and_optional(arrays, tmp_path):
    model = bc(arrays)
    model.load_dataset(arrays)
    mean = model.policy.actor.obs_normalizer.entries["entry0"].mean
    np.testing.assert_allclose(mean, arrays["observations"].mean(axis=0), rtol=1e-4)
    model.save(tmp_path / "model")
    loaded = ConsistencyBC.load(tmp_path / "model")
    assert (loaded.policy.actor.obs_normalizer.entries["entry0"].mean == mean).all()
    observations = arrays["observations"]
    rows, expected = th.as_tensor(observations[:50]), (observations - observations.mean(axis=0)) / observations.std(axis=0)
    for normalise in (model.policy.actor.obs_normalizer, loaded.policy.actor.obs_normalizer):
        np.testing.assert_allclose(normalise(rows), expected[:50], rtol=1e-3, atol=1e-3)
    plain = bc(arrays, normalize_observations=False)
    plain.load_dataset(arrays)
    assert (plain.policy.actor.obs_normalizer.entries["entry0"].mean == 0).all()
    assert (plain.policy.actor.obs_normalizer(rows) == rows).all()


def test_vec_normalize_statistics_are_fitted(arrays):
    env = VecNormalize(make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-1, 1, (1,)))), gamma=0.9)
    model = CPQL("MlpPolicy", env, **SMALL)
    model.load_dataset(arrays)
    np.testing.assert_allclose(env.obs_rms.mean, arrays["observations"].mean(axis=0), rtol=1e-3)
    returns, total = [], 0.0
    for reward, done in zip(arrays["rewards"], arrays["terminations"] | arrays["truncations"], strict=True):
        total = total * 0.9 + reward
        returns.append(total)
        total = 0.0 if done else total
    assert env.ret_rms.var == pytest.approx(np.var(returns), rel=0.01)
    # observations are normalised once, by VecNormalize
    assert (model.policy.actor.obs_normalizer.entries["entry0"].mean == 0).all()


def test_replay_buffers_and_their_files(arrays, tmp_path):
    env = make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-3, 1, (1,))), n_envs=2)
    sac = SAC("MlpPolicy", env, buffer_size=60, policy_kwargs={"net_arch": [8]})
    sac.learn(90)  # wraps around
    sac.save_replay_buffer(tmp_path / "buffer.pkl")
    for dataset in (sac.replay_buffer, tmp_path / "buffer.pkl", str(tmp_path / "buffer.pkl")):
        model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-3, 1, (1,))), **SMALL)
        assert model.load_dataset(dataset) == 60
        ours, theirs = model.replay_buffer, sac.replay_buffer
        assert sorted(ours.actions.flatten()) == pytest.approx(sorted(theirs.actions.flatten()))
        ids, following = ours.observations[:, 0], ours.next_observations[:, 0]
        inside = ours.dones[:-1, 0] == 0
        np.testing.assert_array_equal(following[:-1][inside], ids[1:][inside])


def test_names_of_d4rl(arrays, tmp_path):
    arrays["terminals"], arrays["timeouts"] = arrays.pop("terminations"), arrays.pop("truncations")
    np.savez(tmp_path / "data.npz", **arrays)
    for dataset in (arrays, tmp_path / "data.npz"):
        model = bc(dataset)
        model.load_dataset(dataset)
        assert model.replay_buffer._get_samples(np.array([19, 39])).dones.flatten().tolist() == [1.0, 0.0]


def test_npz_file(arrays, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    assert bc(str(tmp_path / "data.npz")).load_dataset(tmp_path / "data.npz") == 120


def goal_space():
    box = spaces.Box(-10_000, 10_000, (2,), np.float64)
    return spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})


class GoalEnv(VectorEnv):
    def __init__(self):
        super().__init__(observation_space=goal_space())

    def compute_reward(self, achieved, desired, info):
        return -np.linalg.norm(achieved - desired, axis=-1)


def dict_arrays():
    data = make_arrays(obs_dim=2, action_dim=2)
    for key in ("observations", "next_observations"):
        data[key] = {name: data[key].astype(np.float64) for name in ("observation", "achieved_goal", "desired_goal")}
    return data


def test_dict_observations_and_her(tmp_path):
    model = CPQL("MultiInputPolicy", GoalEnv(), replay_buffer_class=HerReplayBuffer, **SMALL)
    model.load_dataset(dict_arrays())
    buffer = model.replay_buffer
    assert (buffer.ep_length[:, 0] == 20).all()
    assert buffer.ep_start[:, 0].tolist() == np.repeat(np.arange(0, 120, 20), 20).tolist()
    sample = buffer.sample(200)
    same_episode = sample.observations["desired_goal"][:, 0] // 1000 == sample.observations["observation"][:, 0] // 1000
    assert same_episode.all()
    # SB3 returns the real goals first: batches that are drawn together must all have their share of others
    replaced = [
        float((b.observations["desired_goal"] != b.observations["observation"]).any(1).float().mean())
        for b in model.batches(10, 64)
    ]
    assert all(0.3 < share < 0.95 for share in replaced)
    model.pretrain(3)
    model.learn(15)
    assert model.num_timesteps == 15
    model.save(tmp_path / "model")
    with pytest.raises(AssertionError, match="must pass an environment"):
        CPQL.load(tmp_path / "model")  # the file is not damaged


def test_vec_normalize_with_statistics_of_some_keys():
    env = VecNormalize(make_vec_env(GoalEnv), norm_obs_keys=["observation"])
    model = CPQL("MultiInputPolicy", env, **SMALL)
    data = dict_arrays()
    model.load_dataset(data)
    assert env.obs_rms.keys() == {"observation"}
    np.testing.assert_allclose(env.obs_rms["observation"].mean, data["observations"]["observation"].mean(axis=0), rtol=1e-3)


def test_nested_dicts_are_flattened_as_the_environment_is():
    box = spaces.Box(-10_000, 10_000, (2,), np.float64)
    env = VectorEnv(observation_space=spaces.Dict({"a": box, "goals": spaces.Dict({"left door": box, "kettle": box})}))
    wrapped = flatten_if_nested(env)
    assert isinstance(wrapped, FlattenNestedDict) and set(wrapped.observation_space) == {
        "a",
        "goals/left door",
        "goals/kettle",
    }
    assert set(wrapped.reset()[0]) == set(wrapped.observation_space)
    data = make_arrays(obs_dim=2, action_dim=2)
    for key in ("observations", "next_observations"):
        data[key] = {"a": data[key], "goals": {"left door": data[key], "kettle": data[key]}}
    model = CPQL("MultiInputPolicy", wrapped, **SMALL)
    assert model.load_dataset(data) == 120
    assert (model.replay_buffer.observations["goals/kettle"] == model.replay_buffer.observations["a"]).all()


def test_images_are_moved_channels_first():
    space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    env = VectorEnv(observation_space=space)
    data = make_arrays(n_episodes=2, length=5, action_dim=2)
    images = np.random.default_rng(0).integers(0, 255, (12, 36, 36, 3), dtype=np.uint8)
    data["observations"], data["next_observations"] = images[:10], images[1:11]
    model = CPQL("CnnPolicy", env, buffer_size=50, **SMALL)
    model.load_dataset(data)
    np.testing.assert_array_equal(model.replay_buffer.observations[:, 0], images[:10].transpose(0, 3, 1, 2))


def test_memory_efficient_buffer(arrays):
    model = CPQL(
        "MlpPolicy",
        VectorEnv(action_space=spaces.Box(-1, 1, (1,))),
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        **SMALL,
    )
    model.load_dataset(arrays)
    batch = model.replay_buffer._get_samples(np.array([0, 5, 118, 119]))
    np.testing.assert_allclose(batch.next_observations[:, 0], arrays["next_observations"][[0, 5, 118, 119], 0])
    model.pretrain(2)


def test_dataset_larger_than_the_buffer_grows_it(arrays):
    for keep in (True, False):
        model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), buffer_size=50, keep_offline=keep, **SMALL)
        assert model.load_dataset(arrays) == 120 and model.replay_buffer.size() == 120


def damage(key, value):
    def apply(data):
        data[key] = value(data[key]) if callable(value) else value
        return data

    return apply


BAD = {
    "nan_observation": (
        damage("observations", lambda x: np.where(x == 5, np.nan, x)),
        "episode 1: observations: nan at step 0",
    ),
    "infinite_reward": (damage("rewards", lambda x: np.where(np.arange(120) == 45, np.inf, x)), "rewards: inf at step 5"),
    "nan_action": (damage("actions", lambda x: np.where(np.arange(120)[:, None] == 7, np.nan, x)), "actions: nan at step 7"),
    "short_actions": (damage("actions", lambda x: x[:-1]), "different lengths: .*119 actions"),
    "wrong_obs": (
        lambda data: {**data, **{k: data[k][:, :2] for k in ("observations", "next_observations")}},
        "Observation spaces don't match",
    ),
    "one_wrong_obs": (damage("observations", lambda x: x[:, :2]), r"shape \(120, 2\), next_observations \(120, 3\)"),
    "wrong_action": (damage("actions", lambda x: np.repeat(x, 2, axis=1)), "Action spaces don't match"),
    "discrete": (damage("actions", lambda x: np.zeros(120, np.int64)), "[Dd]iscrete"),
    "missing": (lambda data: {k: v for k, v in data.items() if k != "actions"}, r"missing \['actions'\]"),
    "empty": (lambda data: {k: v[:0] for k, v in data.items()}, "no transitions"),
    "bounds": (damage("action_space", spaces.Box(-2, 2, (1,))), "Action bounds don't match"),
    "type": (lambda data: 3, "can't read int"),
    "empty_list": (lambda data: [], "list is empty"),
    "wrong_images": (
        lambda data: {**data, "observation_space": spaces.Box(0, 255, (8, 8, 3), np.uint8)},
        "the mapping of arrays has Box",
    ),
    "wide_rewards": (damage("rewards", lambda x: np.stack([x, x], axis=1)), "one number per step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_gets_a_clear_error_and_changes_nothing(case):
    model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), **SMALL)
    good = make_arrays(n_episodes=3)
    model.load_dataset(good)
    before = model.replay_buffer, model.policy.actor.obs_normalizer.entries["entry0"].mean.clone()
    apply, message = BAD[case]
    with pytest.raises(DatasetError, match=message):
        model.load_dataset(apply(make_arrays()))
    assert model.replay_buffer is before[0] and model.replay_buffer.size() == 60
    assert (model.policy.actor.obs_normalizer.entries["entry0"].mean == before[1]).all()


def test_data_without_a_window_change_nothing(arrays):
    model = RACTD("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), horizon=10, pad=False, **SMALL)
    model.load_dataset(arrays)
    buffer, mean = model.replay_buffer, model.policy.teacher_model.obs_normalizer.entries["entry0"].mean.clone()
    with pytest.raises(DatasetError, match="No episode has the 10 steps of a window"):
        model.load_dataset(make_arrays(n_episodes=3, length=5, seed=1), reward_transform="minus_one")
    assert model.replay_buffer is buffer and model.run.reward_function is None and model.data.windows().buffer is buffer
    assert (model.policy.teacher_model.obs_normalizer.entries["entry0"].mean == mean).all()


def test_actions_outside_the_bounds_are_clipped_with_one_warning(arrays):
    arrays["actions"][:30] = 5.0
    model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), **SMALL)
    with pytest.warns(UserWarning, match=r"30 of 120 transitions \(25 %\)") as caught:
        model.load_dataset(arrays)
    assert len(caught) == 1 and model.replay_buffer.actions.max() == 1
    # the episodes 0 and 3 are held out, and not counted
    with pytest.warns(UserWarning, match=r"10 of 80 transitions \(12 %\)"):
        model.load_dataset(arrays, heldout_fraction=1 / 3)


def test_observations_of_another_shape_and_equal_size(arrays):
    n_rows = len(arrays["actions"])
    for key in ("observations", "next_observations"):
        arrays[key] = arrays[key][:, None]
    arrays["observation_space"] = spaces.Box(-np.inf, np.inf, (3,))
    model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), **SMALL)
    assert model.load_dataset(arrays, heldout_fraction=0.3) < n_rows
    assert model.data.heldout["observations"].shape[1:] == (3,)
    model.pretrain(1)


def test_held_out_episodes_of_discrete_observations():
    class Cells(VectorEnv):
        def __init__(self):
            super().__init__(observation_space=spaces.Discrete(5))

    model = CPQL("MlpPolicy", Cells(), **SMALL)
    model.learn(150)
    model.load_dataset(model.replay_buffer, heldout_fraction=0.3)
    assert np.isfinite(model.data.heldout_loss())


def test_next_observations_of_other_shape_name_their_dataset(arrays, tmp_path):
    arrays["next_observations"] = arrays["next_observations"][:, :0]
    np.savez(tmp_path / "second.npz", **{k: v for k, v in arrays.items() if isinstance(v, np.ndarray)})
    with pytest.raises(DatasetError, match=r"second.npz: observations have shape"):
        CPQL("MlpPolicy", dataset=str(tmp_path / "second.npz"), **SMALL)


def test_bad_filters(arrays):
    model = bc(arrays)
    for kwargs in ({"top_fraction": 0}, {"top_fraction": 2}, {"heldout_fraction": 1}, {"reward_transform": "x"}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            model.load_dataset(arrays, **kwargs)
    for kwargs in ({"episodes": [99]}, {"episodes": slice(0, 0)}, {"episodes": [0], "heldout_fraction": 0.5}):
        with pytest.raises(DatasetError, match="episode"):
            model.load_dataset(arrays, **kwargs)


def test_an_environment_that_can_not_be_made(pendulum_dataset, monkeypatch):
    def no_simulator(self, **kwargs):
        raise ImportError("no simulator")

    source = open_dataset("test/pendulum-v0")
    monkeypatch.setattr(type(source.dataset), "recover_environment", no_simulator)
    monkeypatch.setattr(source.dataset.env_spec, "entry_point", "gymnasium_robotics.envs:Kitchen")
    with pytest.raises(DatasetError, match=r"Pendulum-v1.*can't be made.*no simulator.*pass env="):
        source.make_env()


def test_unknown_id_malformed_id_and_no_network(minari_folder, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("minari.storage.hosting.download_dataset", no_network)
    with pytest.raises(DatasetError, match=r"could not be downloaded.*Name or service"):
        ConsistencyBC.from_dataset("no/such-v0")
    (minari_folder / "cut" / "off" / "data").mkdir(parents=True)  # Minari's list of datasets fails here
    (minari_folder / "cut-v0" / "data").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"which has \['cut-v0'\].*Name or service"):
        ConsistencyBC.from_dataset("no/such-v0")
    with pytest.raises(DatasetError, match="neither a Minari id"):
        ConsistencyBC.from_dataset("hopper medium")


def test_no_network_is_told_at_once(minari_folder, monkeypatch):
    import socket

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("minari.storage.hosting.download_dataset", lambda *args: pytest.fail("must not be tried"))
    with pytest.raises(DatasetError, match=r"could not be downloaded.*Name or service") as caught:
        open_dataset("hf://farama-minari/no/such-v0")
    assert caught.value.__suppress_context__  # no pages of the client's retries


def test_a_folder_of_datasets_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "datasets"))
    with pytest.raises(DatasetError, match="set MINARI_DATASETS_PATH"):
        open_dataset("no/such-v0")


def test_discrete_actions_without_an_environment(arrays):
    arrays["actions"] = np.zeros(120, np.int64)
    with pytest.raises(DatasetError, match=r"has actions in Discrete\(1\): only continuous"):
        ConsistencyBC("MlpPolicy", dataset=arrays)


def test_damaged_files(minari_folder, tmp_path, pendulum_dataset):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "broken.pkl").write_bytes(b"\x80\x04 nothing")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([1, 2]))
    for name in ("broken.npz", "broken.pkl", "other.pkl", "missing.npz"):
        with pytest.raises(DatasetError, match=name):
            ConsistencyBC.from_dataset(str(tmp_path / name))
    file = minari_folder / "test" / "pendulum-v0" / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DatasetError, match="damaged"):
        ConsistencyBC.from_dataset("test/pendulum-v0", **SMALL)


def test_minari_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(ImportError, match=r"sb3-consistency\[offline\]"):
        ConsistencyBC.from_dataset("mujoco/hopper/medium-v0")


def test_normalized_score_is_minaris(minari_folder):
    from sb3_consistency.training.scores import normalized_score

    rng = np.random.default_rng(0)
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    data = record_dataset("test/scored-v0", env, lambda obs: rng.uniform(-2, 2, 1).astype(np.float32), 20)
    data.storage.update_metadata({"ref_min_score": -1500.0, "ref_max_score": -100.0})
    data = minari.load_dataset("test/scored-v0")
    assert MinariSource(data).reference_returns == (-1500.0, -100.0)
    expected = 100 * float(minari.get_normalized_score(data, np.array(-400.0)))
    assert normalized_score(-400.0, -1500.0, -100.0) == pytest.approx(expected)


class SharingEnv(VectorEnv):
    """Hands out one array, changed in place, as FrankaKitchen does."""

    def reset(self, **kwargs):
        self.shared, info = super().reset(**kwargs)
        return self.shared, info

    def step(self, action):
        obs, *rest = super().step(action)
        self.shared[:] = obs
        return self.shared, *rest


def test_recording_copies_shared_observations(minari_folder):
    with pytest.warns(UserWarning, match="will not name its environment"):
        dataset = record_dataset("test/sharing-v0", SharingEnv(), lambda obs: np.zeros(2, np.float32), 10)
    with pytest.raises(DatasetError, match="does not name its environment"):
        CPQL.from_dataset("test/sharing-v0")
    assert CPQL.from_dataset("test/sharing-v0", env=SharingEnv(), **SMALL).replay_buffer.size() == 10
    assert ConsistencyBC.from_dataset("test/sharing-v0", **SMALL).learn(2).env is None  # needs none
    assert len(np.unique(dataset[0].observations, axis=0)) == 11


def test_existing_dataset_is_not_overwritten(pendulum_dataset):
    with pytest.raises(DatasetError, match="exists"):
        record_dataset("test/pendulum-v0", "Pendulum-v1", lambda obs: np.zeros(1, np.float32), 5)


def test_buffer_class_is_the_models(arrays):
    for n_steps, expected in ((1, ReplayBuffer), (3, NStepReplayBuffer)):
        model = CPQL("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), n_steps=n_steps, **SMALL)
        model.load_dataset(arrays)
        assert type(model.replay_buffer) is expected


def test_heldout_observations_are_normalised_as_the_batches_are(arrays):
    env = VecNormalize(make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-1, 1, (1,)))))
    model = CPQL("MlpPolicy", env, **SMALL)
    model.load_dataset(arrays, heldout_fraction=0.3)
    seen = []
    model.policy.actor.obs_normalizer.register_forward_hook(lambda module, args, output: seen.append(output))
    model.data.heldout_loss()
    assert seen[0].abs().max() < 10  # raw, the first coordinate goes up to 5019


def test_fewer_transitions_than_environments(arrays):
    env = make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-1, 1, (1,))), n_envs=4)
    model = CPQL("MlpPolicy", env, **SMALL)
    with pytest.raises(DatasetError, match="fewer transitions"):
        model.load_dataset([arrays, make_arrays(n_episodes=1, length=3)])


def test_masks_and_numbers_select_episodes(arrays):
    model = bc(arrays)
    assert model.load_dataset(arrays, episodes=np.arange(6) == 3) == 20 and model.replay_buffer.rewards[0, 0] == 3
    assert model.load_dataset([arrays, arrays], episodes=iter([1, 2])) == 80
    assert model.load_dataset(arrays, episodes=5) == 20
    assert model.load_dataset(arrays, heldout_fraction=0.8) == 20
    assert model.load_dataset(arrays, episodes=[5, 2, 5], heldout_fraction=0.5) == 20
    assert model.replay_buffer.rewards[0, 0] == 5


def test_equal_returns_have_no_spread(arrays):
    with pytest.raises(ValueError, match="iql_locomotion"):
        bc(arrays).load_dataset(arrays, episodes=[2], reward_transform="iql_locomotion")


def test_her_with_a_share_of_one_row():
    model = CPQL("MultiInputPolicy", GoalEnv(), replay_buffer_class=HerReplayBuffer, **SMALL)
    model.load_dataset(dict_arrays())
    model.offline_fraction = 31 / 32
    model.learn(25)
    assert len(next(model.batches(1, 32)).rewards) == 32
