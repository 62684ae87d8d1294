"""Small files of every format that is read, written as their own libraries write them, and what is in them."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
from gymnasium import spaces

ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)


@dataclass(frozen=True)
class Truth:
    """An episode as it happened: T + 1 observations, T actions and rewards."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool

    def __len__(self):
        return len(self.actions)


def happened(lengths=(4, 7, 1, 5, 3), terminated=(True, False, True, False, True), seed=0):
    rng = np.random.default_rng(seed)
    episodes = []
    for number, (length, terminal) in enumerate(zip(lengths, terminated, strict=True)):
        observations = rng.normal(size=(length + 1, 3)).astype(np.float32)
        observations[:, 0] = 1000 * number + np.arange(length + 1)
        actions = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
        rewards = rng.normal(size=length).astype(np.float32)
        rewards[-1] = abs(rewards[-1]) if terminal else -abs(rewards[-1])
        episodes.append(Truth(observations, actions, rewards, bool(terminal)))
    return episodes


def flat(episodes):
    """Steps one after the other, without the last observations."""
    lengths = [len(e) for e in episodes]
    last = np.zeros(sum(lengths), bool)
    last[np.cumsum(lengths) - 1] = True
    terminal = last & np.repeat([e.terminated for e in episodes], lengths)
    return {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]),
        "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminations": terminal,
        "truncations": last & ~terminal,
        "episode": np.repeat(np.arange(len(lengths)), lengths),
        "step": np.concatenate([np.arange(n) for n in lengths]),
    }


def only(arrays, *keys):
    return {key: arrays[key] for key in keys}


# what is kept: all steps; the last step of an episode only where it terminates; all, whose last has no successor
ALL, SHIFTED, CLONED = "all", "shifted", "cloned"
D4RL = ("observations", "actions", "rewards", "terminals", "timeouts")


def npz(folder, episodes):
    np.savez(
        folder / "data.npz", **only(flat(episodes), "observations", "next_observations", "actions", "rewards", "terminations")
    )
    return str(folder / "data.npz")


def npz_one_more(folder, episodes):
    arrays = only(flat(episodes), "actions", "rewards", "terminations", "truncations")
    np.savez_compressed(folder / "data.npz", observations=np.concatenate([e.observations for e in episodes]), **arrays)
    return str(folder / "data.npz")


def npz_shift(folder, episodes):
    arrays = only(flat(episodes), "observations", "actions", "rewards", "terminations", "truncations")
    np.savez_compressed(folder / "data.npz", **arrays)
    return f"npz:{folder}/data.npz"


def npz_actions_alone(folder, episodes):
    np.savez(folder / "data.npz", **only(flat(episodes), "observations", "actions", "episode"))
    return str(folder / "data.npz")


def d4rl(folder, episodes, name="hopper_medium-v2.hdf5", leave_out=("next_observations",)):
    arrays = flat(episodes)
    names = {**{key: key for key in arrays}, "terminations": "terminals", "truncations": "timeouts"}
    with h5py.File(folder / name, "w") as file:
        for key in ("observations", "next_observations", "actions", "rewards", "terminations", "truncations"):
            if key not in leave_out:
                file.create_dataset(names[key], data=arrays[key], compression="gzip")
        file["infos/qpos"] = arrays["observations"]
        file["metadata/algorithm"] = b"SAC"
    return str(folder / name)


def d4rl_next(folder, episodes):
    return f"d4rl:{d4rl(folder, episodes, 'halfcheetah_medium_expert-v2.hdf5', ())}"


def ogbench(folder, episodes):
    """Recordings of one row more than steps, whose terminals are their last rows."""
    rows = {
        "observations": np.concatenate([e.observations for e in episodes]),
        "actions": np.concatenate([np.concatenate([e.actions, np.zeros((1, 2), np.float32)]) for e in episodes]),
        "terminals": np.concatenate([np.arange(len(e) + 1) == len(e) for e in episodes]),
    }
    np.savez_compressed(
        folder / "pointmaze-medium-navigate-v0.npz", **rows, qpos=rows["observations"], qvel=rows["observations"]
    )
    return f"ogbench:{folder}/pointmaze-medium-navigate-v0.npz"


def robomimic(folder, episodes, with_next=True):
    path = folder / "low_dim.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(map(len, episodes))
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
        for number, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{number + 8}")  # demo_10 comes after demo_9
            demo.attrs["num_samples"] = len(episode)
            demo["actions"], demo["rewards"] = episode.actions, episode.rewards
            demo["dones"] = (np.arange(len(episode)) == len(episode) - 1).astype(int)
            demo["states"] = np.zeros((len(episode), 5))
            for group, rows in (("obs", episode.observations[:-1]), ("next_obs", episode.observations[1:])):
                if group == "obs" or with_next:
                    demo[f"{group}/robot0_eef_pos"], demo[f"{group}/object"] = rows[:, :2], rows[:, 2:]
        file["mask/train"] = np.array([b"demo_8", b"demo_10"])
    return f"{path}?obs_keys=robot0_eef_pos,object&success_terminates=1"


def robomimic_short(folder, episodes):
    return robomimic(folder, episodes, with_next=False)


def lerobot(folder, episodes, version=3):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    arrays = flat(episodes)
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]},
        "action": {"dtype": "float32", "shape": [2], "names": None},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        "observation.images.top": {"dtype": "video", "shape": [96, 96, 3], "names": ["height", "width", "channel"]},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in ("episode_index", "frame_index", "index")},
    }
    n = len(arrays["actions"])
    table = pa.table(
        {
            "observation.state": pa.FixedSizeListArray.from_arrays(arrays["observations"].reshape(-1), 3),
            "action": pa.array(arrays["actions"].tolist(), pa.list_(pa.float32())),
            "next.reward": arrays["rewards"],
            "next.done": arrays["terminations"] | arrays["truncations"],
            "next.success": arrays["terminations"],
            "episode_index": arrays["episode"],
            "frame_index": arrays["step"],
            "index": np.arange(n),
        }
    )
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": f"v{version}.0",
        "fps": 10,
        "features": features,
        "total_episodes": len(episodes),
        "total_frames": n,
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    if version == 3:
        pq.write_table(table, folder / "data/chunk-000/file-000.parquet")
    else:
        for number in range(len(episodes)):
            rows = table.filter(pa.array(arrays["episode"] == number))
            pq.write_table(rows, folder / f"data/chunk-000/episode_{number:06d}.parquet")
    return f"{folder}?success_terminates=1"


def video(path, values):
    """Grey frames, one of each value."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")))
        container.mux(stream.encode())


def lerobot_2(folder, episodes):
    return lerobot(folder, episodes, version=2)


def d3rlpy_2(folder, episodes):
    with h5py.File(folder / "dataset.h5", "w") as file:
        file["columns"] = [b"observations", b"actions", b"rewards", b"terminated"]
        file["num_episodes"], file["version"] = len(episodes), "2.1"
        for i, e in enumerate(episodes):
            file[f"observations_{i}"], file[f"actions_{i}"] = e.observations[:-1], e.actions
            file[f"rewards_{i}"], file[f"terminated_{i}"] = e.rewards[:, None], e.terminated
    return str(folder / "dataset.h5")


def d3rlpy_1(folder, episodes):
    arrays = flat(episodes)
    with h5py.File(folder / "dataset.h5", "w") as file:
        for key in ("observations", "actions", "rewards"):
            file[key] = arrays[key]
        file["terminals"] = arrays["terminations"].astype(np.float32)
        file["episode_terminals"] = (arrays["terminations"] | arrays["truncations"]).astype(np.float32)
        file["discrete_action"], file["version"] = False, "1.0"
    return str(folder / "dataset.h5")


class Canary:
    """Unpickling it leaves a mark."""

    ran = False

    def __reduce__(self):
        return setattr, (Canary, "ran", True)


def imitation_npz(folder, episodes):
    arrays = flat(episodes)
    np.savez(
        folder / "final.npz",
        obs=np.concatenate([e.observations for e in episodes]),
        acts=arrays["actions"],
        rews=arrays["rewards"],
        infos=np.array([Canary()] * len(arrays["actions"]), dtype=object),
        terminal=np.array([e.terminated for e in episodes]),
        indices=np.cumsum([len(e) for e in episodes])[:-1],
    )
    return f"imitation:{folder}/final.npz"


def imitation(folder, episodes):
    pa = pytest.importorskip("pyarrow")
    canary = json.dumps({"py/reduce": [{"py/function": "builtins.setattr"}]})
    table = pa.table(
        {
            "obs": [e.observations.tolist() for e in episodes],
            "acts": [e.actions.tolist() for e in episodes],
            "infos": [[canary] * len(e) for e in episodes],
            "terminal": [e.terminated for e in episodes],
            "rews": [e.rewards.tolist() for e in episodes],
        }
    )
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    return str(folder)


def zarr(folder, episodes):
    library = pytest.importorskip("zarr")
    arrays = flat(episodes)
    store = library.open_group(str(folder / "pusht.zarr"), mode="w", zarr_format=2)
    for key, value in (("data/state", arrays["observations"]), ("data/action", arrays["actions"])):
        store.create_array(key, data=value)
    store.create_array("meta/episode_ends", data=np.cumsum([len(e) for e in episodes]).astype(np.int64))
    return str(folder / "pusht.zarr")


def frame(episodes):
    pd = pytest.importorskip("pandas")
    arrays = flat(episodes)
    columns = {"episode": arrays["episode"]}
    for key, name in (("observations", "obs"), ("actions", "action")):
        columns.update({f"{name}_{i}": arrays[key][:, i] for i in range(arrays[key].shape[1])})
    columns.update(reward=arrays["rewards"], terminated=arrays["terminations"].astype(int), comment="text")
    return pd.DataFrame(columns)


def csv(folder, episodes):
    frame(episodes).to_csv(folder / "log.csv", index=False)
    return str(folder / "log.csv")


def parquet(folder, episodes):
    pytest.importorskip("pyarrow")
    frame(episodes).to_parquet(folder / "log.parquet")
    return str(folder / "log.parquet")


def buffer_of(episodes):
    from stable_baselines3.common.buffers import ReplayBuffer

    buffer = ReplayBuffer(100, OBSERVATIONS, ACTIONS)
    for e in episodes:
        for t in range(len(e)):
            last = t == len(e) - 1
            info = [{"TimeLimit.truncated": last and not e.terminated}]
            buffer.add(e.observations[t], e.observations[t + 1], e.actions[t], e.rewards[t], np.array([last]), info)
    return buffer


def pickled_buffer(folder, episodes):
    (folder / "buffer.pkl").write_bytes(pickle.dumps(buffer_of(episodes)))
    return str(folder / "buffer.pkl")


def safe_buffer(folder, episodes):
    from sb3_consistency.data.safe_state import save_buffer

    return str(save_buffer(buffer_of(episodes), folder / "buffer"))


ZOO_ARGUMENTS = """!!python/object/apply:collections.OrderedDict
- - - algo
    - sac
  - - env
    - Pendulum-v1
  - - env_kwargs
    - g: 5.0
  - - device
    - !!python/object/apply:os.system
      - touch {canary}
"""


def zoo(folder, episodes, write=pickled_buffer):
    buffer = Path(write(folder, episodes))
    buffer.rename(buffer.with_stem("replay_buffer"))
    (folder / "Pendulum-v1").mkdir()
    (folder / "Pendulum-v1/args.yml").write_text(ZOO_ARGUMENTS.format(canary=folder / "canary"))
    return str(folder)


def our_zoo(folder, episodes):
    return zoo(folder, episodes, safe_buffer)


def minari_folder(folder, episodes):
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for e in episodes:
        last = np.arange(len(e)) == len(e) - 1
        flags = {"terminations": last & e.terminated, "truncations": last & ~np.bool_(e.terminated)}
        buffers.append(EpisodeBuffer(observations=e.observations, actions=e.actions, rewards=e.rewards, **flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers("test/folder-v0", buffers, observation_space=OBSERVATIONS, action_space=ACTIONS)
    return str(folder / "test/folder-v0")


#: name -> (writer, which steps it keeps, whether terminations are in it, whether rewards are)
FORMATS = {
    "npz": (npz, ALL, True, True),
    "npz with one observation more": (npz_one_more, ALL, True, True),
    "npz without next observations": (npz_shift, SHIFTED, True, True),
    "npz of observations and actions": (npz_actions_alone, CLONED, False, False),
    "d4rl": (d4rl, SHIFTED, True, True),
    "d4rl with next observations": (d4rl_next, ALL, True, True),
    "ogbench": (ogbench, ALL, False, False),
    "robomimic": (robomimic, ALL, True, True),
    "robomimic without next_obs": (robomimic_short, SHIFTED, True, True),
    "lerobot 3": (lerobot, SHIFTED, True, True),
    "lerobot 2": (lerobot_2, SHIFTED, True, True),
    "d3rlpy 2": (d3rlpy_2, SHIFTED, True, True),
    "d3rlpy 1": (d3rlpy_1, SHIFTED, True, True),
    "imitation npz": (imitation_npz, ALL, True, True),
    "imitation": (imitation, ALL, True, True),
    "zarr": (zarr, CLONED, False, False),
    "csv": (csv, SHIFTED, True, True),
    "parquet": (parquet, SHIFTED, True, True),
    "replay buffer": (pickled_buffer, ALL, True, True),
    "replay buffer, saved as numbers": (safe_buffer, ALL, True, True),
    "rl-zoo3 run": (zoo, ALL, True, True),
    "rl-zoo3 run of ours": (our_zoo, ALL, True, True),
    "minari folder": (minari_folder, ALL, True, True),
}


def expected(episodes, kept, has_terminations, has_rewards):
    """Arrays that a reader should give, all episodes joined, and their lengths."""
    rows, lengths = [], []
    for e in episodes:
        terminal = e.terminated and has_terminations
        n = len(e) - (kept == SHIFTED and not terminal)
        if n == 0:
            continue
        following = e.observations[1 : n + 1].copy()
        if kept == CLONED or (kept == SHIFTED and terminal):
            following[-1] = e.observations[n - 1]  # not used: what terminates has no next value
        ends = np.arange(n) == n - 1
        rewards = e.rewards[:n] if has_rewards else np.zeros(n)
        rows.append((e.observations[:n], e.actions[:n], rewards, following, ends & terminal, ends & (not terminal)))
        lengths.append(n)
    keys = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    return {key: np.concatenate([row[i] for row in rows]) for i, key in enumerate(keys)}, lengths


KEYS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")


def read(source):
    """All blocks joined, checked to be what the episodes are."""
    blocks = list(source.blocks(range(len(source.lengths))))
    joined = {key: np.concatenate([getattr(block, key) for block in blocks]) for key in (*KEYS, "ends", "numbers", "steps")}
    single = list(source.episodes(range(len(source.lengths))))
    assert [len(e) for e in single] == source.lengths.tolist()
    for key in KEYS:
        np.testing.assert_array_equal(joined[key], np.concatenate([getattr(e, key) for e in single]))
    np.testing.assert_array_equal(joined["numbers"], np.repeat(np.arange(len(single)), source.lengths))
    np.testing.assert_array_equal(np.flatnonzero(joined["ends"]) + 1, np.cumsum(source.lengths))
    return joined


def assert_is(source, episodes, kept, has_terminations, has_rewards):
    right, lengths = expected(episodes, kept, has_terminations, has_rewards)
    assert source.lengths.tolist() == lengths and source.has_rewards == has_rewards
    got = read(source)
    for key in KEYS:
        np.testing.assert_allclose(got[key], right[key], rtol=1e-6, err_msg=key)
    ends = np.cumsum(lengths)
    sums = [part.sum() for part in np.split(right["rewards"], ends[:-1])]
    np.testing.assert_allclose(source.returns, sums, rtol=1e-5, atol=1e-5)
