"""
Corrupted datasets and model files, by category. ``python tests/corruption.py`` prints how many there are of each.

A case is ``(name, make)``: ``make(folder)`` writes or returns something broken. ``CANNOT_BE_DETECTED`` says what no loader
can notice.
"""

import json
import pickle
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.conftest import make_arrays

ACTIONS = spaces.Box(-1, 1, (1,), np.float32)
OBSERVATIONS = spaces.Box(-10_000, 10_000, (3,), np.float32)
KEYS = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
DATASET_ID = "test/intact-v0"

CANNOT_BE_DETECTED = {
    "finite wrong numbers": "a flipped bit that leaves a number finite is a possible measurement; arrays carry no checksum",
    "two actions or two rewards swapped": "any order of them could have been recorded",
    "rewards of another scale or sign": "the loader can't know the task",
    "episodes missing as a whole": "a smaller dataset is a dataset",
    "a CSV file cut at the end of a line": "a shorter table is a table",
    "a chunk of a Zarr store that is gone": "in Zarr it reads as zeros",
    "a weight of an SB3 zip replaced by a finite number, with its checksum": "only the author could tell",
    "a malicious SB3 zip or replay-buffer pickle": "unpickling runs its code before anything can be checked: use load_safe",
}


def _array_cases():
    """Arrays with the defects that data from one's own scripts has."""
    for key in KEYS:
        for value, name in ((np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "minus infinity")):
            for row in (0, 57, 119):
                if key in ("observations", "actions", "rewards", "next_observations"):
                    yield f"{name} in {key}, row {row}", "not finite", _put(key, row, value)
        if key not in ("rewards", "next_observations", "truncations"):  # which may be left out
            yield f"{key} missing", "missing array", lambda data, k=key: {n: v for n, v in data.items() if n != k}
        yield f"{key} None", "wrong type", _replace(key, lambda x: None)
        yield f"{key} a number", "wrong type", _replace(key, lambda x: 3.0)
        for cut in (1, 20, 119):
            yield f"{key} {cut} rows short", "lengths", _replace(key, lambda x, n=cut: x[:-n])
        yield f"{key} one row long", "lengths", _replace(key, lambda x: np.concatenate([x, x[-1:]]))
        yield f"{key} empty", "lengths", _replace(key, lambda x: x[:0])
        yield f"{key} transposed", "shape", _replace(key, lambda x: np.stack([x, x]).T)
        yield f"{key} as objects", "wrong type", _replace(key, lambda x: np.array([{"a": 1}] * len(x), dtype=object))
        yield f"{key} as texts", "wrong type", _replace(key, lambda x: np.full(x.shape, "text"))
        yield f"{key} complex", "wrong type", _replace(key, lambda x: x + 1j)
        yield f"{key} as dates", "wrong type", _replace(key, lambda x: np.zeros(x.shape, "datetime64[s]"))
        yield f"{key} ragged", "wrong type", _replace(key, lambda x: [[1.0]] * (len(x) - 1) + [[1.0, 2.0]])
    for a, b in (
        ("observations", "actions"),
        ("actions", "rewards"),
        ("next_observations", "rewards"),
        ("actions", "terminations"),
    ):
        yield f"{a} and {b} swapped", "swapped", lambda data, a=a, b=b: {**data, a: data[b], b: data[a]}
    yield "terminations that are no flags", "wrong type", _replace("terminations", lambda x: np.linspace(0, 5, len(x)))
    yield "truncations that are NaN", "not finite", _replace("truncations", lambda x: np.full(len(x), np.nan))
    for key in ("observations", "next_observations"):
        yield f"{key} of another width", "spaces", _replace(key, lambda x: x[:, :2])
    yield "both observations of another width", "spaces", _all_observations(lambda x: x[:, :2])
    yield "both observations flat", "spaces", _all_observations(lambda x: x[:, 0])
    yield "images", "spaces", _all_observations(lambda x: np.zeros((len(x), 36, 36, 3), np.uint8))
    yield "a dict of observations", "spaces", _all_observations(lambda x: {"a": x})
    yield "an empty dict of observations", "spaces", _all_observations(lambda x: {})
    yield (
        "dicts of different keys",
        "spaces",
        lambda d: {**d, "observations": {"a": d["observations"]}, "next_observations": {"b": d["observations"]}},
    )
    yield "actions of another width", "spaces", _replace("actions", lambda x: np.repeat(x, 2, axis=1))
    yield "discrete actions", "spaces", _replace("actions", lambda x: np.zeros(len(x), np.int64))
    for name, space in (
        ("bounds", spaces.Box(-2, 2, (1,))),
        ("shape", spaces.Box(-1, 1, (2,))),
        ("discrete", spaces.Discrete(2)),
        ("text", "Box"),
    ):
        yield f"another action space ({name})", "spaces", _replace("action_space", lambda x, s=space: s)
    for name, space in (
        ("shape", spaces.Box(-1, 1, (7,))),
        ("dict", spaces.Dict({"a": OBSERVATIONS})),
        ("discrete", spaces.Discrete(2)),
        ("text", "Box"),
    ):
        yield f"another observation space ({name})", "spaces", _replace("observation_space", lambda x, s=space: s)
    yield "rewards beyond float32", "not finite", _replace("rewards", lambda x: x.astype(np.float64) + 1e300)
    yield "observations beyond float32", "not finite", _all_observations(lambda x: x.astype(np.float64) + 1e300)
    yield "nothing", "missing array", lambda data: {}
    yield "no rows", "lengths", lambda data: {k: v[:0] for k, v in data.items()}
    for name, value in (
        ("a number", 3),
        ("None in a list", [None]),
        ("an empty list", []),
        ("a set", {1}),
        ("an array", np.zeros(3)),
    ):
        yield name, "wrong type", lambda data, v=value: v


def _put(key, row, value):
    def change(data):
        data[key] = data[key].copy()
        data[key].reshape(len(data[key]), -1)[row, -1] = value
        return data

    return change


def _replace(key, function):
    return lambda data: {**data, key: function(data.get(key))}


def _all_observations(function):
    return lambda data: {**data, **{key: function(data[key]) for key in ("observations", "next_observations")}}


def arrays_cases():
    for name, category, change in _array_cases():
        yield f"arrays: {name}", f"arrays: {category}", lambda folder, change=change: change(make_arrays())


# --- files


def damaged_bytes(data, seed=0, n_offsets=12):
    """Truncations at many offsets, runs of zeros and of noise; every one differs from the original."""
    rng = np.random.default_rng(seed)
    for share in np.linspace(0, 0.999, n_offsets):
        yield f"truncated to {100 * share:.1f} %", data[: int(share * len(data))]
    yield "only zeros", bytes(len(data))
    yield "only noise", rng.bytes(len(data))
    yield "a web page", b"<!DOCTYPE html><html><body>404</body></html>"
    for share in np.linspace(0, 0.9, n_offsets // 2):
        start = int(share * len(data))
        length = max(64, len(data) // 10)
        yield f"noise at {100 * share:.0f} %", data[:start] + rng.bytes(length) + data[start + length :]


def _files(name, suffix, write):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"intact{suffix}"
        write(path)
        data = path.read_bytes()
    for damage, content in damaged_bytes(data):
        if suffix == ".pkl" and damage.startswith("noise at"):
            continue  # inside the arrays of numbers it may stay finite

        def make(folder, content=content):
            path = Path(folder) / f"broken{suffix}"
            path.write_bytes(content)
            return str(path)

        yield f"{name}: {damage}", f"{name}: damaged bytes", make


def npz_cases():
    yield from _files("npz", ".npz", lambda path: np.savez(path, **make_arrays()))
    yield from _files("compressed npz", ".npz", lambda path: np.savez_compressed(path, **make_arrays()))
    for name, change in {
        "one array missing": lambda a: {k: v for k, v in a.items() if k != "actions"},
        "pickled objects": lambda a: {**a, "rewards": np.array([{}] * 120, dtype=object)},
        "NaN": lambda a: {**a, "rewards": a["rewards"] * np.nan},
        "no array": lambda a: {},
    }.items():

        def make(folder, change=change):
            np.savez(Path(folder) / "broken.npz", **change(make_arrays()))
            return str(Path(folder) / "broken.npz")

        yield f"npz: {name}", "npz: content", make
    yield "npz: missing file", "npz: content", lambda folder: str(Path(folder) / "missing.npz")


def _buffer():
    from stable_baselines3.common.buffers import ReplayBuffer

    buffer = ReplayBuffer(40, OBSERVATIONS, ACTIONS)
    rng = np.random.default_rng(0)
    for t in range(30):
        obs = rng.uniform(-1, 1, (2, 1, 3)).astype(np.float32)
        buffer.add(obs[0], obs[1], rng.uniform(-1, 1, (1, 1)), np.ones(1), np.array([t % 10 == 9]), [{}])
    return buffer


def buffer_cases():
    yield from _files("replay buffer", ".pkl", lambda path: path.write_bytes(pickle.dumps(_buffer())))

    def change(attribute, value):
        def make(folder):
            buffer = _buffer()
            setattr(buffer, attribute, value(getattr(buffer, attribute)))
            return buffer

        return make

    for name, make in {
        "NaN reward": change("rewards", lambda x: x * np.nan),
        "infinite action": change("actions", lambda x: x + np.inf),
        "NaN observation": change("observations", lambda x: x * np.nan),
        "position beyond the end": change("pos", lambda x: 10_000),
        "negative position": change("pos", lambda x: -3),
        "empty": change("pos", lambda x: 0),
        "actions cut": change("actions", lambda x: x[:7]),
        "rewards cut": change("rewards", lambda x: x[:7]),
        "dones cut": change("dones", lambda x: x[:7]),
        "next observations cut": change("next_observations", lambda x: x[:7]),
        "observations of another width": change("observations", lambda x: x[..., :2]),
        "actions None": change("actions", lambda x: None),
        "another space": change("observation_space", lambda x: spaces.Box(-1, 1, (9,))),
    }.items():
        yield f"replay buffer: {name}", "replay buffer: content", make
    for name, value in (("a list", [1]), ("None", None), ("a class", dict)):

        def write(folder, value=value):
            path = Path(folder) / "broken.pkl"
            path.write_bytes(pickle.dumps(value))
            return str(path)

        yield f"replay buffer: {name}", "replay buffer: content", write


# --- Minari


def intact_minari(root):
    """A dataset of four episodes in ``root``; set MINARI_DATASETS_PATH to it."""
    from sb3_consistency.data.record import record_dataset

    rng = np.random.default_rng(0)
    env = gym.make("Pendulum-v1", max_episode_steps=15)
    record_dataset(DATASET_ID, env, lambda obs: rng.uniform(-2, 2, 1).astype(np.float32), 50)
    return root / DATASET_ID / "data"


def _h5(change):
    def apply(data):
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            change(file)

    return apply


def _rewrite(key, function):
    def change(file):
        array = file[key][()]
        attributes = dict(file[key].attrs)
        del file[key]
        file[key] = function(array)
        file[key].attrs.update(attributes)

    return change


def _with(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def minari_cases(data):
    """
    :param data: folder of :func:`intact_minari`
    """
    original = (data / "main_data.hdf5").read_bytes()
    for damage, content in damaged_bytes(original, n_offsets=30):
        if not damage.startswith("noise at"):  # noise inside the arrays of numbers may stay finite
            yield f"minari: {damage}", "minari: damaged bytes", lambda d, c=content: (d / "main_data.hdf5").write_bytes(c)
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        path = f"episode_1/{key}"
        yield f"minari: no {key}", "minari: missing", _h5(lambda f, p=path: f.__delitem__(p))
        for cut in (1, 5):
            yield f"minari: {key} {cut} short", "minari: lengths", _h5(_rewrite(path, lambda x, n=cut: x[:-n]))
        yield f"minari: {key} one long", "minari: lengths", _h5(_rewrite(path, lambda x: np.concatenate([x, x[-1:]])))
        yield f"minari: {key} empty", "minari: lengths", _h5(_rewrite(path, lambda x: x[:0]))
        yield f"minari: {key} as texts", "minari: wrong type", _h5(_rewrite(path, lambda x: np.full(x.shape, b"text")))
        yield f"minari: {key} one number", "minari: wrong type", _h5(_rewrite(path, lambda x: 3.0))
    for key in ("observations", "actions", "rewards"):
        for value in (np.nan, np.inf, -np.inf):
            for row in (0, 7):
                change = _rewrite(f"episode_2/{key}", lambda x, r=row, v=value: _with(x, r, v))
                yield f"minari: {value} in {key}, row {row}", "minari: not finite", _h5(change)
    wide = lambda x: np.repeat(x, 2, axis=1)  # noqa: E731
    yield "minari: wide observations", "minari: shape", _h5(_rewrite("episode_0/observations", wide))
    yield "minari: wide actions", "minari: shape", _h5(_rewrite("episode_0/actions", wide))
    yield "minari: an episode gone", "minari: missing", _h5(lambda f: f.__delitem__("episode_1"))
    yield "minari: the last episode gone", "minari: missing", _h5(lambda f: f.__delitem__("episode_3"))
    yield "minari: all episodes gone", "minari: missing", _h5(lambda f: [f.__delitem__(key) for key in list(f)])
    yield "minari: no number of steps", "minari: metadata", _h5(lambda f: f["episode_1"].attrs.__delitem__("total_steps"))
    for steps in (0, -1, 3, 99):
        yield (
            f"minari: says {steps} steps",
            "minari: metadata",
            _h5(lambda f, n=steps: f["episode_1"].attrs.modify("total_steps", n)),
        )
    yield "minari: no data file", "minari: missing", lambda d: (d / "main_data.hdf5").unlink()
    yield "minari: no metadata", "minari: missing", lambda d: (d / "metadata.json").unlink()
    for name, text in (
        ("empty", ""),
        ("cut", '{"total_episodes": '),
        ("a list", "[]"),
        ("noise", "\x00\x01"),
        ("no entries", "{}"),
    ):
        yield f"minari: metadata {name}", "minari: metadata", lambda d, t=text: (d / "metadata.json").write_text(t)
    for key, value in (
        ("total_episodes", 99),
        ("total_episodes", "many"),
        ("total_episodes", 0),
        ("observation_space", "nonsense"),
        ("observation_space", '{"type": "Box", "dtype": "float32", "shape": [7], "low": [0], "high": [1]}'),
        ("action_space", '{"type": "Discrete", "dtype": "int64", "start": 0, "n": 2}'),
        ("action_space", "{"),
        ("data_format", "nonsense"),
    ):
        yield f"minari: {key}={value!r}"[:60], "minari: metadata", lambda d, k=key, v=value: _set_metadata(d, k, v)


def _set_metadata(data, key, value):
    path = data / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


# --- models


def zip_cases(intact, others):
    """
    :param intact: zip file of a model
    :param others: zip files of models with other algorithms or shapes, by name
    """
    original = Path(intact).read_bytes()
    for damage, content in damaged_bytes(original, n_offsets=20):
        yield f"zip: {damage}", "zip: damaged bytes", lambda path, c=content: path.write_bytes(c)
    for position in np.linspace(0.02, 0.98, 12):
        yield (
            f"zip: 64 bytes flipped at {100 * position:.0f} %",
            "zip: flipped bytes",
            lambda path, p=position: path.write_bytes(flip(original, int(p * len(original)))),
        )
    with zipfile.ZipFile(intact) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for name in ("data", "policy.pth", "actor.optimizer.pth", "critic.optimizer.pth"):
        yield f"zip: no {name}", "zip: members", _repack(members, {name: None})
        yield f"zip: {name} empty", "zip: members", _repack(members, {name: b""})
        yield f"zip: {name} cut", "zip: members", _repack(members, {name: members[name][: len(members[name]) // 2]})
    swapped = {"policy.pth": members["actor.optimizer.pth"], "actor.optimizer.pth": members["policy.pth"]}
    yield "zip: members swapped", "zip: members", _repack(members, swapped)
    yield "zip: no member", "zip: members", _repack({}, {})
    for name, other in others.items():
        yield f"zip: {name}", "zip: of another model", lambda path, o=other: shutil.copy(o, path)


def flip(data, position, length=64):
    return data[:position] + bytes(255 - b for b in data[position : position + length]) + data[position + length :]


def _repack(members, changes):
    def make(path):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in {**members, **changes}.items():
                if content is not None:
                    file.writestr(name, content)

    return make


def safe_cases(intact):
    """
    :param intact: file of save_safe
    """
    original = Path(intact).read_bytes()
    for damage, content in damaged_bytes(original, n_offsets=20):
        yield f"safe: {damage}", "safe: damaged bytes", lambda path, c=content: path.write_bytes(c)
    for position in np.linspace(0, 0.999, 20):
        yield (
            f"safe: one bit flipped at {100 * position:.0f} %",
            "safe: flipped bits",
            lambda path, p=position: path.write_bytes(flip_bit(original, int(p * len(original)))),
        )


def flip_bit(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


# --- other formats: the writers are in formats.py, whose episodes have actions of two entries


def format_cases():
    """Files and folders of other people's formats; a case is skipped where the library that writes one is missing."""
    for name, keys in HDF5_KEYS.items():
        yield from _damaged_files(name, "**/*.h*5", n_offsets=6)
        for key in keys:
            for damage, function in HDF5_DAMAGE.items():
                yield f"{name}: {key} {damage}", f"{name}: content", _damaged(name, "**/*.h*5", _h5_file(key, function))
    for name, keys in NPZ_KEYS.items():
        yield from _damaged_files(name, "**/*.npz", n_offsets=6)
        for key in keys:
            for damage, function in NPZ_DAMAGE.items():
                if not (key in ("rews", "rewards") and damage == "missing"):  # which may be left out
                    yield f"{name}: {key} {damage}", f"{name}: content", _damaged(name, "**/*.npz", _npz_file(key, function))
    for name, pattern in (("lerobot 3", "data/**/*.parquet"), ("imitation", "**/*.arrow"), ("parquet", "**/*.parquet")):
        yield from _damaged_files(name, pattern, n_offsets=6)
    yield from folder_cases()
    for name in ("lerobot 3", "lerobot 2"):
        for damage, text in {"empty": "", "a list": "[]", "no features": "{}", "other numbers": None}.items():
            yield f"{name}: info {damage}", f"{name}: content", _damaged(name, "meta/info.json", _info(text))
        yield (
            f"{name}: a table gone",
            f"{name}: content",
            _damaged(name, "data/chunk-000/*.parquet", lambda path: path.unlink()),
        )
    for damage, change in {
        "NaN": lambda t: t.replace(",", ",nan", 60).replace("nan1", "nan"),
        "texts": lambda t: t.replace("\n", "\nx"),
        "no rows": lambda t: t.splitlines()[0],
        "nothing": lambda t: "",
        "other columns": lambda t: t.replace("obs_", "o"),
        "no actions": lambda t: t.replace("action_", "a"),
        "a web page": lambda t: "<!DOCTYPE html><html><body>404</body></html>",
    }.items():
        yield f"csv: {damage}", "csv: content", _damaged("csv", "*.csv", _text(change))
    for damage, change in {"ends": lambda t: "[]", "noise": lambda t: "\x00", "no type": lambda t: "{}"}.items():
        for member in ("data/action", "data/state", "meta/episode_ends"):
            yield f"zarr: {member} {damage}", "zarr: content", _damaged("zarr", f"*.zarr/{member}/.zarray", _text(change))


def folder_cases():
    """Of formats that the cases above know in another shape: run folders, folders of Minari, safe replay buffers."""
    for name, pattern in (
        ("replay buffer, saved as numbers", "*.safetensors"),
        ("rl-zoo3 run", "replay_buffer.pkl"),
        ("rl-zoo3 run of ours", "replay_buffer.safetensors"),
        ("minari folder", "**/main_data.hdf5"),
    ):
        yield from _damaged_files(name, pattern, n_offsets=6)
    for position in np.linspace(0, 0.999, 8):
        yield (
            f"replay buffer, saved as numbers: one bit flipped at {100 * position:.0f} %",
            "replay buffer, saved as numbers: flipped bits",
            _damaged(
                "replay buffer, saved as numbers",
                "*.safetensors",
                lambda path, p=position: path.write_bytes(flip_bit(path.read_bytes(), int(p * path.stat().st_size))),
            ),
        )
    for damage, text in {"empty": "", "a list": "[]", "no entries": "{}"}.items():
        yield (
            f"minari folder: metadata {damage}",
            "minari folder: content",
            _damaged("minari folder", "**/data/metadata.json", lambda path, text=text: path.write_text(text)),
        )


HDF5_KEYS = {
    "d4rl": ("observations", "actions", "rewards", "terminals", "timeouts"),
    "d4rl with next observations": ("next_observations",),
    "robomimic": ("data/demo_9/actions", "data/demo_9/rewards", "data/demo_9/obs/object", "data/demo_9/next_obs/object"),
    "d3rlpy 2": ("actions_1", "observations_2", "rewards_0", "terminated_1", "num_episodes"),
    "d3rlpy 1": ("observations", "actions", "rewards", "terminals", "episode_terminals"),
}
HDF5_DAMAGE = {
    "one short": lambda x: x[:-1],
    "not finite": lambda x: x * np.nan,
    "as texts": lambda x: np.full(np.shape(x), b"text"),
}
NPZ_KEYS = {
    "ogbench": ("observations", "actions", "terminals"),
    "imitation npz": ("obs", "acts", "rews", "terminal", "indices"),
    "npz with one observation more": ("observations", "actions", "rewards", "terminations"),
}


NPZ_DAMAGE = {"missing": None, "short": lambda x: x[:-1], "as texts": lambda x: np.full(len(x), "text")}


def _damaged(name, pattern, damage):
    """A dataset of a format, one of whose files is damaged."""

    def make(folder):
        from tests import formats

        dataset = formats.FORMATS[name][0](folder, formats.happened())
        damage(sorted(folder.glob(pattern))[0])
        return dataset

    return make


def _damaged_files(name, pattern, n_offsets):
    for damage, _ in damaged_bytes(bytes(1000), n_offsets=n_offsets):
        if damage.startswith("noise at") and not pattern.endswith(".npz"):
            continue  # inside the arrays of numbers it may stay finite

        def apply(path, damage=damage):
            path.write_bytes(dict(damaged_bytes(path.read_bytes(), n_offsets=n_offsets))[damage])

        yield f"{name}: {damage}", f"{name}: damaged bytes", _damaged(name, pattern, apply)


def _h5_file(key, function):
    def apply(path):
        with h5py.File(path, "r+") as file:
            value = file[key][()]
            del file[key]
            if np.ndim(value) or function is not HDF5_DAMAGE["one short"]:  # a single number is left out instead
                file[key] = function(value)

    return apply


def _npz_file(key, function):
    def apply(path):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "infos"}
        value = arrays.pop(key)
        np.savez(path, **arrays, **({} if function is None else {key: function(value)}))

    return apply


def _text(change):
    return lambda path: path.write_text(change(path.read_text()))


def _info(text):
    def apply(path):
        content = json.loads(path.read_text())
        content["total_frames"] = 99
        path.write_text(json.dumps(content) if text is None else text)

    return apply


def dataset_cases():
    """All broken datasets but those of Minari, which need an intact one first, and of :func:`format_cases`."""
    return [*arrays_cases(), *npz_cases(), *buffer_cases()]


def count(cases):
    """Number of cases by category."""
    table = {}
    for _, category, _ in cases:
        table[category] = table.get(category, 0) + 1
    return table


def main():
    """Print the tables of docs/reliability.md."""
    import os

    from sb3_consistency import CPQL
    from tests.conftest import box_env, trained

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        model = trained(CPQL)
        model.save(root / "model.zip")
        model.save_safe(root / "model")
        datasets = [*dataset_cases(), *minari_cases(intact_minari(root)), *format_cases()]
        others = dict.fromkeys(OTHER_MODELS)
        models = [*zip_cases(root / "model.zip", others), *safe_cases(root / "model.safetensors")]
        assert box_env is not None
    for title, cases in (("Corrupted datasets", datasets), ("Corrupted model files", models)):
        print(f"| {title} | {len(cases)} |\n|---|---|")
        for category, n in count(cases).items():
            print(f"| {category} | {n} |")
        print()


OTHER_MODELS = ("a ConsistencyBC", "a RACTD", "an SB3 SAC", "other layers", "other observations", "other actions")

if __name__ == "__main__":
    main()
