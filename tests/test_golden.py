"""Models that earlier versions saved load, act and train on as they did (made by tests/golden/make.py)."""

import json

import numpy as np
import pytest
import torch as th

from sb3_consistency import load_safe, registry
from tests.conftest import make_arrays, weights
from tests.golden.make import FOLDER, N_STEPS, OBSERVATIONS, plain_options

EXPECTED = {path.parent.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/expected.json"))}
CASES = [(version, name) for version, models in EXPECTED.items() for name in models]


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
@pytest.mark.parametrize(("version", "name"), CASES)
def test_models_of_earlier_versions_act_and_train_on(version, name, kind):
    expected, cls = EXPECTED[version][name], registry.algorithm(name)
    path = FOLDER / version / f"{cls.__name__}.{kind}"
    model = load_safe(path, device="cpu") if kind == "safetensors" else cls.load(path, device="cpu")
    assert type(model) is cls and model.n_updates == N_STEPS
    np.testing.assert_allclose(model.predict(OBSERVATIONS, deterministic=True)[0], expected["actions"], atol=1e-5)
    # what was an option then has the value that it had then
    options = plain_options(model)
    assert {name: options[name] for name in expected["options"]} == expected["options"]
    optimizer = getattr(model.policy, next(iter(model.losses()))).optimizer
    assert optimizer.state and all(x["step"] > 0 for x in optimizer.state.values())
    before = weights(model)
    model.load_dataset(make_arrays())
    model.pretrain(2)
    after = weights(model)
    assert model.n_updates == N_STEPS + 2 and after.isfinite().all() and not th.equal(before, after)


def test_every_release_has_its_models():
    assert EXPECTED and all(EXPECTED.values())
    for version, models in EXPECTED.items():
        files = {f"{name}.{kind}" for name in models for kind in ("zip", "safetensors")}
        assert {path.name for path in (FOLDER / version).iterdir()} == {"expected.json", *files}
