"""The commands that take a trained model: record and export; statistics of observations go along with it."""

from collections import OrderedDict
from copy import deepcopy

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_consistency
from sb3_consistency import CPQL
from sb3_consistency.__main__ import find_vec_normalize, main
from tests.conftest import SMALL

OPTIONS = {"learning_starts": 20, "buffer_size": 200, "batch_size": 16, "policy_kwargs": {"net_arch": [16]}, "seed": 0}
OBS = np.array([[0.5, 0.5, 6.0]], np.float32)


def trained(cls, folder):
    env = VecNormalize(make_vec_env("Pendulum-v1", seed=0))
    checkpoints = CheckpointCallback(40, str(folder), "m", save_vecnormalize=True)
    model = cls("MlpPolicy", env, **deepcopy(OPTIONS)).learn(60, callback=checkpoints)
    return model, env


def in_sb3s_layout(model, env, folder):
    return folder / "m_40_steps.zip"


def beside(model, env, folder):
    (folder / "m_vecnormalize_40_steps.pkl").unlink()
    env.save(folder / "vecnormalize.pkl")
    model.save(folder / "model.zip")
    return folder / "model.zip"


def in_the_zoos_layout(model, env, folder):
    (folder / "m_vecnormalize_40_steps.pkl").unlink()
    (folder / "Pendulum-v1").mkdir()
    env.save(folder / "Pendulum-v1/vecnormalize.pkl")
    (folder / "Pendulum-v1/config.yml").write_text(yaml.dump(OrderedDict(normalize=True)))
    model.save(folder / "best_model.zip")
    return folder / "best_model.zip"


LAYOUTS = [in_sb3s_layout, beside, in_the_zoos_layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_takes_the_statistics_that_lie_beside_the_model(layout, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, env = trained(CPQL, tmp_path)
    path = layout(model, env, tmp_path)
    loaded = CPQL.load(path)
    saved = VecNormalize.load(str(find_vec_normalize(path)), make_vec_env("Pendulum-v1"))
    expected = {
        "normalised.onnx": loaded.predict(saved.normalize_obs(OBS), deterministic=True)[0],
        "raw.onnx": loaded.predict(OBS, deterministic=True)[0],
    }
    for name, more in {"normalised.onnx": [], "raw.onnx": ["--vec-normalize", "none"]}.items():
        out = tmp_path / name
        assert main(["export", "--algo", "cpql", "--model", str(path), "--output", str(out), *more]) == 0
        (action,) = onnxruntime.InferenceSession(out).run(None, {"observation": OBS})
        np.testing.assert_allclose(action, expected[name], atol=1e-4)
        assert ("are normalised with" in capsys.readouterr().out) == (more == [])
    assert not np.allclose(*expected.values(), atol=1e-3)


def test_export_takes_the_statistics_of_several_environments(tmp_path):
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    CPQL("MlpPolicy", env, learning_starts=4, **SMALL).learn(8).save(tmp_path / "model")
    env.save(tmp_path / "vecnormalize.pkl")
    out = tmp_path / "policy.pt"
    assert main(["export", "--algo", "cpql", "--model", str(tmp_path / "model.zip"), "--output", str(out)]) == 0
    expected = CPQL.load(tmp_path / "model").predict(env.normalize_obs(OBS), deterministic=True)[0]
    np.testing.assert_allclose(th.jit.load(out)(th.as_tensor(OBS)).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [CPQL, SAC])
def test_record_acts_on_what_the_model_was_trained_on(cls, layout, minari_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    model, env = trained(cls, folder)
    path = layout(model, env, folder)
    command = ["record", "--algo", cls.__name__, "--model", str(path), "--env", "Pendulum-v1", "--deterministic", "-n", "20"]
    assert main([*command, "--dataset-id", "test/recorded-v0"]) == 0
    (episode,) = sb3_consistency.open_dataset("test/recorded-v0").episodes([0])
    saved = VecNormalize.load(str(find_vec_normalize(path)), make_vec_env("Pendulum-v1"))
    loaded = cls.load(path)
    expected = loaded.predict(saved.normalize_obs(episode.observations), deterministic=True)[0]
    np.testing.assert_allclose(episode.actions, expected, atol=1e-4)
    assert not np.allclose(expected, loaded.predict(episode.observations, deterministic=True)[0], atol=1e-3)


@pytest.mark.parametrize("command", [["export", "--output", "m.pt2"], ["record", "--env", "Pendulum-v1", "-n", "20"]])
def test_a_model_that_learned_from_normalised_observations_says_so(command, minari_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained(CPQL, tmp_path)[0].save(tmp_path / "model.zip")
    (tmp_path / "m_vecnormalize_40_steps.pkl").unlink()
    command += ["--algo", "cpql", "--model", "model.zip"] + (["--dataset-id", "test/r-v0"] if command[0] == "record" else [])
    assert main(command) == 1
    assert "or none to go without" in capsys.readouterr().err
    assert main([*command, "--vec-normalize", "none"]) == 0


def test_statistics_of_another_model_are_left_alone(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    _, env = trained(SAC, tmp_path / "other")
    env.save(tmp_path / "other/vecnormalize.pkl")
    # no folder of the zoo's
    assert find_vec_normalize(tmp_path / "plain.zip") is None
    env.save(tmp_path / "vecnormalize.pkl")
    CPQL("MlpPolicy", "Pendulum-v1", **deepcopy(OPTIONS)).learn(30).save(tmp_path / "plain.zip")
    command = ["export", "--algo", "cpql", "--model", str(tmp_path / "plain.zip"), "--output", str(tmp_path / "m.pt2")]
    assert main(command) == 0 and "are normalised with" not in capsys.readouterr().out


def test_an_offline_phase_has_statistics_of_its_own(tmp_path):
    statistics = [tmp_path / where / "Pendulum-v1/vecnormalize.safetensors" for where in (".", "pretrain")]
    for path in statistics:
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "Pendulum-v1/config.yml").touch()
    assert [find_vec_normalize(path.parents[1] / "best_model.zip") for path in statistics] == statistics


def test_statistics_that_should_be_there_and_are_not(tmp_path, capsys):
    model = CPQL("MlpPolicy", "Pendulum-v1", **OPTIONS)
    model.save(tmp_path / "Pendulum-v1.zip")
    notes = tmp_path / "Pendulum-v1/config.yml"
    notes.parent.mkdir()
    command = ["export", "--algo", "cpql", "--model", str(tmp_path / "Pendulum-v1.zip"), "--output", str(tmp_path / "m.pt2")]
    for normalize, status in ((False, 0), ("{'norm_reward': False}", 1), (True, 1)):
        # as rl-zoo3 writes it
        notes.write_text(yaml.dump(OrderedDict(batch_size=8, normalize=normalize)))
        assert main(command) == status
        assert ("there is no vecnormalize.safetensors" in capsys.readouterr().err) == (status == 1)
    assert main([*command, "--vec-normalize", "none"]) == 0


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert sb3_consistency.__version__ in capsys.readouterr().out
