"""Every format is read right, to the last episode; what can be read in two ways is refused."""

import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sb3_consistency import CPQL, RACTD, ConsistencyBC, DatasetError, DiffusionBC, register_dataset
from sb3_consistency.data.environment import environment_differs
from sb3_consistency.data.formats.table import read_frame
from sb3_consistency.data.opening import open_dataset
from sb3_consistency.data.stored import ChainedRows, ForwardRows, StoredRows, open_npz, take
from tests import formats
from tests.conftest import ALGORITHMS, SMALL, VectorEnv, make_arrays
from tests.formats import KEYS, assert_is, read

ENV = {"observation_space": formats.OBSERVATIONS, "action_space": formats.ACTIONS}


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_file_holds_what_happened(name, tmp_path):
    write, *how = formats.FORMATS[name]
    episodes = formats.happened()
    source = open_dataset(write(tmp_path, episodes))
    assert_is(source, episodes, *how)
    dropped = [len(e) for e in episodes if how[0] == formats.SHIFTED and not (e.terminated and how[1])]
    assert any(f"dropped the last step of {len(dropped)} of 5" in note for note in source.notes) == bool(dropped)
    assert not formats.Canary.ran and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["npz", "npz with one observation more", "npz without next observations", "d4rl", "ogbench"])
@given(episodes=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lengths_and_flags(name, episodes, tmp_path_factory):
    write, *how = formats.FORMATS[name]
    happened = formats.happened(*zip(*episodes, strict=True))
    path = write(tmp_path_factory.mktemp("any"), happened)
    if not formats_left(happened, *how):
        with pytest.raises(DatasetError, match="no transitions"):
            open_dataset(path)
    else:
        assert_is(open_dataset(path), happened, *how)


def formats_left(episodes, kept, has_terminations, has_rewards):
    return kept != formats.SHIFTED or any(len(e) > 1 or (e.terminated and has_terminations) for e in episodes)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_model_trains_on_it(name, tmp_path):
    write, kept, *_ = formats.FORMATS[name]
    dataset = write(tmp_path, formats.happened())
    model = ConsistencyBC("MlpPolicy", VectorEnv(**ENV), **SMALL)
    n_steps = model.load_dataset(dataset)
    assert n_steps == {formats.SHIFTED: 18, formats.CLONED: 20, formats.ALL: 20}[kept]
    model.pretrain(2)


def test_what_is_dropped_is_told_once(tmp_path):
    model = CPQL("MlpPolicy", VectorEnv(**ENV), **SMALL)
    with pytest.warns(UserWarning, match=r"dropped the last step of 2 of 5 episodes \(2 of 20 steps\)") as caught:
        model.load_dataset(formats.d4rl(tmp_path, formats.happened()))
    assert len(caught) == 1


def test_the_last_row_of_a_buffer_of_two_columns_reads_as_arrays_do():
    """An episode that a new start cuts ends there, in a buffer as in arrays."""
    arrays = formats.flat(formats.happened(terminated=(False,) * 5))
    del arrays["truncations"], arrays["episode"]
    buffer = formats.buffer_of(formats.happened(terminated=(False,) * 5))
    buffer.dones[:] = buffer.timeouts[:] = 0
    for dataset in (arrays, buffer):
        source = open_dataset(dataset)
        assert source.lengths.tolist() == [4, 7, 1, 5, 3]
        assert read(source)["truncations"].sum() == 5


# --- OGBench


def compact(episodes, masks):
    rows = open_npz_rows(episodes)
    rows["valids"] = 1.0 - rows["terminals"]
    return {**rows, "masks": masks, "rewards": masks - 1.0}


def open_npz_rows(episodes):
    return {
        "observations": np.concatenate([e.observations for e in episodes]),
        "actions": np.concatenate([np.concatenate([e.actions, e.actions[-1:]]) for e in episodes]),
        "terminals": np.concatenate([np.arange(len(e) + 1) == len(e) for e in episodes]).astype(np.float32),
    }


def test_terminals_of_ogbench_are_no_terminations():
    episodes = formats.happened()
    rows = open_npz_rows(episodes)
    masks = np.ones(len(rows["actions"]))
    masks[[2, 7]] = 0
    source = open_dataset(compact(episodes, masks))
    right, lengths = formats.expected(episodes, formats.ALL, False, True)
    got = read(source)
    assert source.lengths.tolist() == lengths
    np.testing.assert_array_equal(got["next_observations"], right["next_observations"])
    # the goal is reached at the third step of the first episode and of the second (row 5 is its first), and the world goes on
    assert np.flatnonzero(got["terminations"]).tolist() == [2, 6]
    # its loader's regular form has the next observations, and flags the last step that is kept
    regular = {**formats.only(right, "observations", "actions", "next_observations"), "masks": 1 - got["terminations"]}
    regular.update(terminals=got["ends"].astype(np.float32), rewards=got["rewards"])
    again = read(open_dataset(regular))
    for key in KEYS:
        np.testing.assert_array_equal(again[key], got[key], err_msg=key)


def test_raw_arrays_of_ogbench_are_recognised_by_their_states():
    rows = open_npz_rows(formats.happened())
    source = open_dataset({**rows, "qpos": rows["observations"], "qvel": rows["observations"]})
    assert source.lengths.tolist() == [4, 7, 1, 5, 3] and not source.terminations.any()
    with pytest.raises(DatasetError, match=r"two ways: as D4RL's.*as OGBench's"):
        open_dataset(rows)


def test_a_name_of_ogbench_is_looked_for_in_a_folder(tmp_path):
    formats.ogbench(tmp_path, formats.happened())
    assert len(open_dataset(f"ogbench:pointmaze-medium-navigate-v0?folder={tmp_path}").lengths) == 5
    with pytest.raises(DatasetError, match=r"no file .*cube-double-play-v0\.npz: fetch it with ogbench"):
        open_dataset(f"ogbench:cube-double-play-singletask-task3-v0?folder={tmp_path}")
    with pytest.raises(DatasetError, match="task must be one of 1, 2, 3, 4, 5, default, got '9'"):
        open_dataset("ogbench:cube-double-play-v0?task=9")
    with pytest.raises(DatasetError, match="name of OGBench"):
        open_dataset("ogbench:cube")


# --- names and missing keys


@pytest.mark.parametrize(
    "names",
    [
        {"observations": "obs", "actions": "acts", "rewards": "rews", "next_observations": "next_obs"},
        {"observations": "observation", "actions": "action", "rewards": "reward", "terminations": "terminated"},
        {"terminations": "terminals", "truncations": "timeouts"},
        {"truncations": "truncated", "next_observations": "new_obs"},
    ],
)
def test_synonyms(names, arrays):
    renamed = {names.get(key, key): value for key, value in arrays.items()}
    ours, theirs = read(open_dataset(arrays)), read(open_dataset(renamed))
    for key in KEYS:
        np.testing.assert_array_equal(ours[key], theirs[key])
    with pytest.raises(DatasetError, match="all mean"):
        open_dataset({**arrays, "obs": arrays["observations"]})


def test_done_can_be_read_in_two_ways(arrays):
    done = arrays["terminations"] | arrays["truncations"]
    right = read(open_dataset(arrays))["terminations"]
    arrays["dones"] = done
    del arrays["terminations"]
    np.testing.assert_array_equal(read(open_dataset(arrays))["terminations"], right)
    # or beside terminations, where they tell the other ends
    del arrays["next_observations"]
    del arrays["truncations"]
    arrays["terminations"] = right
    got = open_dataset(arrays)
    assert got.lengths.tolist() == [20, 19] * 3 and got.terminations.sum() == 3
    del arrays["terminations"]
    with pytest.raises(DatasetError, match=r"'dones' can be read in two ways.*Call them 'terminations' or 'truncations'"):
        open_dataset(arrays)


def test_masks_beside_time_outs_are_no_ogbench(arrays):
    named = {"terminals": arrays["terminations"], "timeouts": arrays["truncations"], "masks": 1.0 - arrays["terminations"]}
    rows = formats.only(arrays, "observations", "actions", "rewards")
    for more in ({}, {"next_observations": arrays["next_observations"]}):
        plain = formats.only(named, "terminals", "timeouts")
        with_masks, without = (read(open_dataset({**rows, **more, **flags})) for flags in (named, plain))
        for key in KEYS:
            np.testing.assert_array_equal(with_masks[key], without[key])
        assert with_masks["terminations"].sum() == 3


def test_floats_are_not_cut_to_integers():
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    images = np.random.default_rng(0).uniform(size=(20, 3, 36, 36))
    arrays = {"observations": images, "actions": np.zeros((20, 2)), "episode": np.zeros(20)}
    model = ConsistencyBC("CnnPolicy", VectorEnv(space), **SMALL)
    with pytest.raises(DatasetError, match=r"observations are float64, 0\.\d+ for example, and the environment's uint8"):
        model.load_dataset(arrays)
    model.load_dataset({**arrays, "observations": (255 * images).round()})
    assert model.replay_buffer.observations.max() == 255
    with pytest.raises(DatasetError, match="300"):
        model.load_dataset({**arrays, "observations": np.full((20, 3, 36, 36), 300)})


def test_terminals_without_time_outs(arrays):
    arrays["terminals"] = arrays.pop("terminations")
    del arrays["truncations"]
    assert len(open_dataset(arrays).lengths) == 6  # cut where observations jump
    del arrays["next_observations"]
    with pytest.raises(DatasetError, match="two ways"):
        open_dataset(arrays)


def test_rewards_are_needed_where_values_are_learned(arrays):
    del arrays["rewards"]
    source = open_dataset(arrays)
    assert not source.has_rewards and (source.returns == 0).all()
    with pytest.raises(DatasetError, match=r"has no rewards, which CPQL needs.*ConsistencyBC"):
        source.require_rewards("CPQL")
    env = VectorEnv(action_space=spaces.Box(-1, 1, (1,)))
    for cls in ALGORITHMS:
        model = cls("MlpPolicy", env, **SMALL)
        if cls in (ConsistencyBC, DiffusionBC):
            assert model.load_dataset(arrays) == 120
        else:
            with pytest.raises(DatasetError, match=f"has no rewards, which {cls.__name__} needs"):
                model.load_dataset(arrays)
    assert RACTD("MlpPolicy", env, reward_weight=0, **SMALL).load_dataset(arrays) == 120
    model = ConsistencyBC("MlpPolicy", env, **SMALL)
    for kwargs in ({"top_fraction": 0.5}, {"reward_transform": "normalize"}):
        with pytest.raises(DatasetError, match=next(iter(kwargs))):
            model.load_dataset(arrays, **kwargs)
    with pytest.raises(DatasetError, match="terminations"):
        open_dataset({key: value for key, value in make_arrays().items() if key not in ("terminations", "truncations")})


def test_observations_and_actions_alone_are_one_episode(arrays):
    source = open_dataset(formats.only(arrays, "observations", "actions"))
    assert source.lengths.tolist() == [120] and "one episode" in source.notes[0]


def test_dicts_of_one_observation_more(arrays):
    episodes = formats.happened()
    rows = np.concatenate([e.observations for e in episodes])
    given = {**formats.only(formats.flat(episodes), "actions", "rewards", "terminations", "truncations")}
    source = open_dataset({**given, "observations": {"a": rows, "b": {"c": rows[:, :1]}}})
    last = next(source.episodes([4]))
    np.testing.assert_array_equal(last.next_observations["b"]["c"], episodes[4].observations[1:, :1])
    with pytest.raises(DatasetError, match="different lengths"):
        open_dataset({**given, "observations": {"a": rows, "b": rows[:-1]}})


# --- single formats


def test_d4rl_without_time_outs_is_cut_by_the_time_limit(tmp_path):
    episodes = formats.happened((5, 5, 3, 5, 2), (False, False, True, False, True))
    path = formats.d4rl(tmp_path, episodes, "demos.hdf5", ("next_observations", "truncations"))
    assert_is(open_dataset(f"d4rl:{path}?max_episode_steps=5"), episodes, formats.SHIFTED, True, True)
    with pytest.raises(DatasetError, match=r"max_episode_steps must be a number of at least 1, got '0'"):
        open_dataset(f"d4rl:{path}?max_episode_steps=0")
    with pytest.raises(DatasetError, match=r"max_episode_steps: .* has 'timeouts'.*leave it out"):
        open_dataset(f"{formats.d4rl(tmp_path, episodes)}?max_episode_steps=5")
    with pytest.raises(DatasetError, match=r"no 'timeouts'.*max_episode_steps=1000"):
        open_dataset(path)
    source = open_dataset(
        formats.d4rl(tmp_path, episodes, "maze2d-umaze-sparse-v1.hdf5", ("next_observations", "truncations"))
    )
    assert source.lengths.tolist() == [13, 7] and source.reference_returns == (23.85, 161.86)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("hopper_medium-v2.hdf5", (-20.272305, 3234.3)),
        ("walker_mixed.hdf5", (1.629008, 4592.3)),
        ("Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5", (0.0, 1.0)),
        ("maze2d-medium-dense-v1.hdf5", (44.264742, 297.4552547777125)),
        ("mini_kitchen_microwave_kettle_light_slider-v0.hdf5", (0.0, 4.0)),
        ("pen-v0_demos_clipped.hdf5", (96.262799, 3076.8331017826877)),
        ("bullet-hopper_medium.hdf5", None),
    ],
)
def test_reference_returns_of_d4rl(name, reference, tmp_path):
    source = open_dataset(formats.d4rl(tmp_path, formats.happened(), name))
    assert source.reference_returns == reference


def test_filters_and_keys_of_robomimic(tmp_path):
    path = formats.robomimic(tmp_path, formats.happened()).partition("?")[0]
    source = open_dataset(f"robomimic:{path}?filter=train")
    assert source.lengths.tolist() == [4, 1] and set(source.observation_space) == {"robot0_eef_pos", "object"}
    assert not source.terminations.any()  # dones may mark last steps
    assert open_dataset(f"{path}?obs_keys=object").observation_space.shape == (1,)
    for option, message in (
        ("filter=test", "no filter 'test'"),
        ("obs_keys=image", "no obs"),
        ("keys=a", r"no option 'keys'; it has \['obs_keys', 'filter'"),
    ):
        with pytest.raises(DatasetError, match=message):
            open_dataset(f"{path}?{option}")


def test_actions_of_lerobot_are_bounded_by_the_data(tmp_path):
    episodes = [replace(e, actions=100 * e.actions) for e in formats.happened()]
    source = open_dataset(formats.lerobot(tmp_path, episodes))
    everything = np.concatenate([e.actions for e in episodes])
    np.testing.assert_allclose(source.action_space.high, everything.max(axis=0))
    assert any("observation.images.top" in note for note in source.notes)
    model = ConsistencyBC("MlpPolicy", dataset=source, **SMALL)
    assert model.load_dataset(source) == 18
    np.testing.assert_allclose(model.replay_buffer.actions.max(axis=(0, 1))[0], 1, rtol=1e-5)


def test_columns_of_a_table_can_be_named(tmp_path):
    episodes = formats.happened()
    table = formats.frame(episodes).rename(columns={"obs_0": "x", "obs_1": "y", "obs_2": "z", "action_0": "u", "reward": "r"})
    table.to_csv(tmp_path / "log.csv", index=False)
    source = open_dataset(f"{tmp_path}/log.csv?observations=z,x&actions=u&rewards=r")
    last = next(source.episodes([len(source.lengths) - 1]))
    np.testing.assert_allclose(last.observations, episodes[-1].observations[:-1, [2, 0]], rtol=1e-6)
    np.testing.assert_allclose(last.rewards, episodes[-1].rewards, rtol=1e-6)
    assert open_dataset(formats.frame(episodes)).lengths.tolist() == [4, 6, 1, 4, 3]
    # the next observation by another name, and D4RL's flags
    following = {f"obs_next_{i}": np.arange(len(table)) for i in range(3)}
    source = open_dataset(formats.frame(episodes).assign(**following, timeouts=0).rename(columns={"terminated": "terminals"}))
    assert source.observation_space.shape == (3,) and source.next_observations.shape == (len(table), 3)
    assert source.terminations.sum() == formats.frame(episodes)["terminated"].sum() > 0
    # names that are told belong to no other group; without rewards nobody asks what "done" means
    named = {f"obs_next_{i}": name for i, name in enumerate(("obs_next_x", "obs_next_y", "obs_next_z"))}
    table = formats.frame(episodes).assign(**following).rename(columns=named)
    source = read_frame(table, observations="obs_0,obs_next_x,obs_next_y,obs_next_z")
    assert source.observation_space.shape == (4,) and source.next_observations is None
    cloned = formats.frame(episodes).rename(columns={"terminated": "done"})
    assert open_dataset(cloned.drop(columns="reward")).lengths.tolist() == [4, 7, 1, 5, 3]
    with pytest.raises(DatasetError, match="'done' can be read in two ways"):
        open_dataset(cloned)
    with pytest.raises(DatasetError, match="no columns of observations"):
        open_dataset(f"{tmp_path}/log.csv")
    with pytest.raises(DatasetError, match=r"must hold numbers"):
        open_dataset(f"{tmp_path}/log.csv?observations=comment&actions=u")


def test_trajectories_of_imitation_keep_their_types(tmp_path):
    pa = pytest.importorskip("pyarrow")
    folder, images = tmp_path / "run[1]", np.random.default_rng(0).integers(0, 255, (2, 4, 6, 6, 3), np.uint8)
    folder.mkdir()
    nested = pa.uint8()
    for _ in range(4):
        nested = pa.list_(nested)
    acts = pa.array([[[0.5], [0.25], [1.0]]] * 2, pa.list_(pa.list_(pa.float32())))
    table = pa.table({"obs": pa.array(images.tolist(), nested), "acts": acts, "terminal": [True, False]})
    for file in ("data-00000-of-00001.arrow", "state.json"):
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    source = open_dataset(f"imitation:{folder}")
    assert source.observation_space == spaces.Box(0, 255, (6, 6, 3), np.uint8) and source.actions.dtype == np.float32
    for episode, frames in zip(source.episodes([0, 1]), images, strict=True):
        np.testing.assert_array_equal(episode.observations, frames[:3])


def test_a_run_of_the_zoo_names_its_environment(tmp_path):
    source = open_dataset(formats.zoo(tmp_path, formats.happened()))
    assert source.env_spec.id == "Pendulum-v1" and source.env_spec.kwargs["g"] == 5.0
    env = source.make_env()
    assert env.unwrapped.g == 5.0 and environment_differs(source, env) is None
    assert "g=5.0 there, 10.0 here" in environment_differs(source, gym.make("Pendulum-v1"))
    with pytest.raises(DatasetError, match="can't tell the format of the folder"):
        open_dataset(tmp_path / "Pendulum-v1")


def test_names_of_d4rl_are_explained(minari_folder):
    for name, minari_id in (("hopper-medium-v2", "mujoco/hopper/medium-v0"), ("pen-human-v1", "D4RL/pen/human-v2")):
        with pytest.raises(DatasetError, match=f"is D4RL's name: Minari's is '{minari_id}'"):
            open_dataset(name)


def test_own_formats(tmp_path, monkeypatch):
    def opener(path, scale="1"):
        arrays = make_arrays()
        arrays["rewards"] *= float(scale)
        return arrays

    register_dataset("mine", opener)
    assert open_dataset("mine:anything?scale=2").returns.max() == 200
    for prefix in ("d4rl", "x", "a b", "UP"):
        with pytest.raises(ValueError, match="prefix"):
            register_dataset(prefix, opener)


def test_a_package_can_bring_a_format(monkeypatch):
    class EntryPoint:
        def load(self):
            return lambda path: make_arrays()

    found = []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **kwargs: found.append(kwargs) or [EntryPoint()])
    assert len(open_dataset("theirs:x").lengths) == 6
    assert found[0] == {"group": "sb3_consistency.datasets", "name": "theirs"}


# --- environments


def test_environments_that_differ_are_named(minari_folder):
    from sb3_consistency import record_dataset

    env = gym.make("Pendulum-v1", g=9.0, max_episode_steps=10)
    record_dataset("test/pendulum-v0", env, lambda obs: np.zeros(1, np.float32), 20)
    source = open_dataset("test/pendulum-v0")
    assert source.env_specs[0].id == "Pendulum-v1"
    assert environment_differs(source, gym.make("Pendulum-v1", g=9.0)) is None
    assert environment_differs(source, None) is None
    message = environment_differs(source, gym.make("Pendulum-v1"))
    assert "test/pendulum-v0" in message and "g=9.0 there, 10.0 here" in message
    other = environment_differs(source, gym.make("MountainCarContinuous-v0"))
    assert "Pendulum-v1, the model acts in MountainCarContinuous-v0" in other
    assert environment_differs(open_dataset(make_arrays()), env) is None
    model = CPQL("MlpPolicy", "Pendulum-v1", **SMALL)
    with pytest.warns(UserWarning, match=r"g=9.0 there, 10.0 here") as caught:
        model.load_dataset("test/pendulum-v0")
    assert len(caught) == 1
    CPQL.from_dataset("test/pendulum-v0", **SMALL)


# --- reading in pieces


def test_rows_in_files_are_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_consistency.data.stored.SMALL_BYTES", 64)
    rng = np.random.default_rng(0)
    array = rng.normal(size=(500, 3))
    np.savez_compressed(tmp_path / "a.npz", a=array, flags=np.ones(3, bool))
    stored = open_npz(str(tmp_path / "a.npz"))["a"]
    assert isinstance(stored, StoredRows)
    for rows in (np.arange(400, 500), np.arange(10), np.array([3, 3, 4]), np.array([0, 250, 499]), np.array([7, 2])):
        np.testing.assert_array_equal(take(stored, rows), array[rows])
    np.testing.assert_array_equal(np.asarray(stored), array)


class Decoded(ForwardRows):
    """Rows that are decoded as they are read, and how many were."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.n_decoded = array, array.shape, array.dtype, 0
        super().__init__(self, "rows")
        self._begin()

    def restart(self):
        self.next = 0

    def advance(self, n_rows):
        self.next += n_rows
        self.n_decoded += n_rows
        return self.array[self.next - n_rows : self.next]


def test_episodes_that_lie_far_apart_are_read_once_and_alone():
    arrays = {"actions": np.zeros((100_000, 1), np.float32), "observations": Decoded(np.arange(200_000.0).reshape(-1, 2))}
    stored, largest = arrays["observations"], []
    stored._read = lambda rows, read=stored._read: largest.append(rows.stop - rows.start) or read(rows)
    source = open_dataset({**arrays, "episode": np.repeat(np.arange(1000), 100)})
    (block,) = source.blocks([3, 990])
    np.testing.assert_array_equal(block.observations, stored.array[np.r_[300:400, 99_000:99_100]])
    inside = ~block.ends
    np.testing.assert_array_equal(block.next_observations[inside], stored.array[np.r_[301:400, 99_001:99_100]])
    assert max(largest) <= 101 and stored.n_decoded == 99_100


def test_what_was_decoded_is_let_go_where_there_are_many_files():
    rng = np.random.default_rng(0)
    parts = [Decoded(rng.normal(size=(10, 3))) for _ in range(20)]
    chained, whole = ChainedRows(parts, "rows"), np.concatenate([part.array for part in parts])
    for _ in range(2):
        for start in range(0, 200, 5):
            np.testing.assert_array_equal(chained[start : start + 6], whole[start : start + 6])
            assert sum(len(part._last) > 0 for part in parts) <= 3
    assert sum(part.n_decoded for part in parts) == 2 * 200


@pytest.mark.parametrize("block_bytes", [1, 50, 10_000])
def test_blocks_of_any_size_fill_the_buffer_alike(block_bytes, arrays, monkeypatch):
    from stable_baselines3.common.env_util import make_vec_env

    def filled(n_envs):
        env = make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-1, 1, (1,))), n_envs=n_envs)
        model = CPQL("MlpPolicy", env, **SMALL)
        model.load_dataset(arrays, episodes=[0, 2, 3, 5])
        buffer = model.replay_buffer
        return buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts

    right = [filled(n_envs) for n_envs in (1, 3)]
    monkeypatch.setattr("sb3_consistency.data.flat.BLOCK_BYTES", block_bytes)
    for n_envs, arrays_there in zip((1, 3), right, strict=True):
        for ours, theirs in zip(filled(n_envs), arrays_there, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("version", [3, 2])
def test_videos_of_lerobot(version, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    episodes = formats.happened()
    formats.lerobot(tmp_path, episodes, version)
    key, info = "observation.images.top", json.loads((tmp_path / "meta/info.json").read_text())
    values = np.arange(20) * 12  # one a step, over all episodes
    if version == 3:
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        files = [0, 0, 0, 1, 1]  # of the five episodes
        for file, part in enumerate((values[:12], values[12:])):
            formats.video(tmp_path / f"videos/{key}/chunk-000/file-{file:03d}.mp4", part)
        (tmp_path / "meta/episodes/chunk-000").mkdir(parents=True)
        table = {"episode_index": range(5), f"videos/{key}/chunk_index": [0] * 5, f"videos/{key}/file_index": files}
        pq.write_table(pa.table({k: list(v) for k, v in table.items()}), tmp_path / "meta/episodes/chunk-000/file-000.parquet")
    else:
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        for number, part in enumerate(np.split(values, np.cumsum([len(e) for e in episodes])[:-1])):
            formats.video(tmp_path / f"videos/chunk-000/{key}/episode_{number:06d}.mp4", part)
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    source = open_dataset(f"{tmp_path}?videos={key}&size=16x24&success_terminates=1")
    assert source.observation_space["images_top"].shape == (16, 24, 3) and not any("left out" in n for n in source.notes)
    for number, first in ((0, 0), (1, 4), (4, 17)):
        episode = next(source.episodes([number]))
        images = episode.observations["images_top"]
        shown = images.reshape(len(images), -1).mean(axis=1)
        np.testing.assert_allclose(shown, values[first : first + len(images)], atol=4)
        np.testing.assert_allclose(episode.next_observations["images_top"][:-1].mean((1, 2, 3)), shown[1:], atol=1)
        np.testing.assert_array_equal(episode.observations["state"], episodes[number].observations[: len(images)])
    for option, message in (("videos=observation.images.side", "no video"), (f"videos={key}&size=0", "size must be")):
        with pytest.raises(DatasetError, match=message):
            open_dataset(f"{tmp_path}?{option}")
    next(tmp_path.glob("videos/**/*.mp4")).unlink()
    with pytest.raises(DatasetError, match="no file"):
        open_dataset(f"{tmp_path}?videos={key}")


# --- models without an environment


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_what_learns_offline_only_needs_no_environment(cls, arrays, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    if cls.offline_only:
        model = cls.from_dataset(str(tmp_path / "data.npz"), **SMALL)
        assert model.env is None and model.replay_buffer.size() == 120
        model.learn(2)
    else:
        with pytest.raises(DatasetError, match="does not name its environment: pass env="):
            cls.from_dataset(str(tmp_path / "data.npz"), **SMALL)
    arrays["actions"] *= 3
    with pytest.raises(DatasetError, match=r"env="):
        cls.from_dataset(arrays, **SMALL)
