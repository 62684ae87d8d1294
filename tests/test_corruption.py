"""Corrupted data and model files: a clear error within seconds, and nothing half-loaded. The cases are in corruption.py."""

import hashlib
import os
import pickle
import resource
import shutil
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC

from sb3_consistency import CPQL, RACTD, ConsistencyBC
from sb3_consistency.data.episodes import DatasetError
from sb3_consistency.files.safe import SafeLoadError, load_safe
from sb3_consistency.files.zip import ModelFileError
from tests import corruption, formats
from tests.conftest import SMALL, VectorEnv, box_env, make, make_arrays, trained

SECONDS, MEBIBYTES = 5.0, 300
DATASETS = corruption.dataset_cases()


def state(model):
    """A digest of everything that loading a dataset may change."""
    buffer = model.replay_buffer
    arrays = [buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts]
    weights = [w.numpy() for w in model.policy.state_dict().values()]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in (*arrays, *weights)))
    data = (model.data.separate, model.data.segments, model.data.heldout, model.run.reward_function)
    rest = (id(buffer), buffer.pos, buffer.full, *data)
    return digest.hexdigest(), *map(repr, rest)


@pytest.fixture(scope="module")
def model():
    model = CPQL("MlpPolicy", VectorEnv(corruption.OBSERVATIONS, corruption.ACTIONS), **SMALL)
    model.load_dataset(make_arrays())
    return model


def assert_refused(model, dataset):
    before, memory, start = state(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(DatasetError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning for the user would be lost in the error
        warnings.filterwarnings("ignore", message=".* is a pickle")
        model.load_dataset(dataset)
    assert time.perf_counter() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1024 * MEBIBYTES
    assert len(str(caught.value)) > 20, caught.value
    assert state(model) == before
    return str(caught.value)


@pytest.mark.parametrize(("name", "category", "make_broken"), DATASETS, ids=[name for name, _, _ in DATASETS])
def test_broken_datasets(name, category, make_broken, model, tmp_path):
    assert_refused(model, make_broken(tmp_path))


@pytest.fixture(scope="module")
def two_actions():
    model = CPQL("MlpPolicy", VectorEnv(formats.OBSERVATIONS, formats.ACTIONS), **SMALL)
    model.load_dataset(make_arrays(action_dim=2))
    return model


FORMAT_CASES = list(corruption.format_cases())


@pytest.mark.parametrize(("name", "category", "make_broken"), FORMAT_CASES, ids=[name for name, _, _ in FORMAT_CASES])
def test_broken_files_of_other_formats(name, category, make_broken, two_actions, tmp_path):
    dataset = make_broken(tmp_path)
    assert_refused(two_actions, dataset)
    assert not formats.Canary.ran


@pytest.fixture(scope="module")
def minari_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        corruption.intact_minari(root)
        yield root


@pytest.fixture(scope="module")
def pendulum_model(minari_root):
    return CPQL.from_dataset(corruption.DATASET_ID, **SMALL)


def test_broken_minari_datasets(minari_root, pendulum_model, tmp_path, monkeypatch):
    """All in one test: the cases depend on the bytes of the intact dataset."""
    monkeypatch.setattr("minari.storage.hosting.download_dataset", lambda *args, **kwargs: pytest.fail("must not download"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    failures = []
    for name, _, damage in corruption.minari_cases(minari_root / corruption.DATASET_ID / "data"):
        shutil.rmtree(tmp_path / "test", ignore_errors=True)
        shutil.copytree(minari_root / "test", tmp_path / "test")
        damage(tmp_path / corruption.DATASET_ID / "data")
        try:
            assert_refused(pendulum_model, corruption.DATASET_ID)
        except BaseException as error:  # pytest's own failures, too: all are collected
            failures.append(f"{name}: {error!r}"[:300])
    assert not failures, "\n".join(failures)
    pendulum_model.pretrain(2)


def test_after_all_errors_the_model_trains_and_acts(model):
    model.pretrain(3)
    assert model.n_updates == 3
    action, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
    assert corruption.ACTIONS.contains(action)


# --- models


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = trained(CPQL)
    model.save(folder / "model.zip")
    model.save_safe(folder / "model")
    return folder, model


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    wide = VectorEnv(spaces.Box(-1, 1, (5,), np.float32), corruption.ACTIONS)
    models = {
        "a ConsistencyBC": trained(ConsistencyBC),
        "a RACTD": trained(RACTD),
        "an SB3 SAC": SAC("MlpPolicy", box_env(), buffer_size=10, policy_kwargs={"net_arch": [8]}),
    }
    for name, other in models.items():
        other.save(folder / f"{name}.zip")
    assert set(corruption.OTHER_MODELS) - set(models) == {"other layers", "other observations", "other actions"}
    members = {
        "other layers": make(CPQL, policy_kwargs={"net_arch": [8]}),
        "other observations": CPQL("MlpPolicy", wide, **SMALL),
        "other actions": CPQL("MlpPolicy", VectorEnv(box_env().observation_space), **SMALL),
    }
    for name, other in members.items():
        other.save(folder / "other.zip")
        _mix(folder / "other.zip", folder / f"{name}.zip")
    return {name: folder / f"{name}.zip" for name in corruption.OTHER_MODELS}


def _mix(source, target):
    """The configuration of one model with the weights of another."""
    import zipfile

    trained(CPQL).save(target)
    with zipfile.ZipFile(target) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(source) as file:
        members["data"] = file.read("data")
    with zipfile.ZipFile(target, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def check_models(cases, load, error_class, path, model):
    """Refuses every file, or (where bytes that nobody reads were hit) gives exactly the model that was saved."""
    failures, n_refused = [], 0
    for name, _, damage in cases:
        damage(path)
        start = time.perf_counter()
        try:
            loaded = load(path)
        except error_class as error:
            n_refused += 1
            if path.name not in str(error):
                failures.append(f"{name}: {error} does not name the file")
        except Exception as error:
            failures.append(f"{name}: {error!r}"[:300])
        else:
            ours, theirs = model.policy.state_dict(), loaded.policy.state_dict()
            if not all(th.equal(ours[key], theirs[key]) for key in ours) or loaded.gamma != model.gamma:
                failures.append(f"{name}: loaded as another model")
        assert time.perf_counter() - start < SECONDS, name
    assert not failures, "\n".join(failures)
    return n_refused


def test_broken_zips(intact, others, tmp_path):
    folder, model = intact
    cases = list(corruption.zip_cases(folder / "model.zip", others))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SB3's, of objects that it could not unpickle
        n_refused = check_models(cases, CPQL.load, ModelFileError, tmp_path / "broken.zip", model)
    assert n_refused > 0.8 * len(cases)


def test_broken_safe_files(intact, tmp_path):
    folder, model = intact
    cases = list(corruption.safe_cases(folder / "model.safetensors"))
    assert check_models(cases, load_safe, SafeLoadError, tmp_path / "broken.safetensors", model) == len(cases)


def test_parameters_of_another_shape_change_nothing(tmp_path):
    model, other = trained(CPQL), trained(CPQL, policy_kwargs={"net_arch": [8]})
    before = {key: w.clone() for key, w in model.policy.state_dict().items()}
    for parameters in (other.get_parameters(), {**model.get_parameters(), "policy": {}}):
        with pytest.raises((ValueError, RuntimeError)):
            model.set_parameters(parameters)
        assert all(th.equal(before[key], w) for key, w in model.policy.state_dict().items())


def test_a_broken_replay_buffer_file_leaves_the_buffer(tmp_path):
    model = make(CPQL).pretrain(1)
    model.learn(12)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    data = (tmp_path / "buffer.pkl").read_bytes()
    before = model.replay_buffer, model.offline_buffer, model.data.in_replay
    for content in (data[: len(data) // 2], b"", b"\x80\x04 nothing", pickle.dumps([1])):
        (tmp_path / "broken.pkl").write_bytes(content)
        with pytest.raises(DatasetError, match=r"broken\.pkl"):
            model.load_replay_buffer(tmp_path / "broken.pkl")
        assert (model.replay_buffer, model.offline_buffer, model.data.in_replay) == before
    model.learn(3, reset_num_timesteps=False)


def test_there_are_many_cases_each_once(minari_root, intact, others):
    folder, _ = intact
    minari_cases = list(corruption.minari_cases(minari_root / corruption.DATASET_ID / "data"))
    assert len(DATASETS) + len(FORMAT_CASES) + len(minari_cases) >= 200
    zips = list(corruption.zip_cases(folder / "model.zip", others))
    assert len(zips) + len(list(corruption.safe_cases(folder / "model.safetensors"))) >= 50
    names = [name for name, _, _ in DATASETS]
    assert len(set(names)) == len(names)


def test_gymnasium_is_not_asked_to_make_the_environment_of_a_broken_dataset(minari_root, monkeypatch):
    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: pytest.fail("must not be made"))
    with pytest.raises(DatasetError, match="can't tell the format"):
        CPQL.from_dataset(os.path.relpath("/etc/passwd"))
