"""
Saved models that later versions must load, and act by as before.

``python -m tests.golden.make`` writes a folder for the present version. A released version's stays as it is; one that is
not released yet may be deleted and written anew.
"""

import json
from pathlib import Path
from unittest import mock

import numpy as np

from sb3_consistency import RACTD, __version__
from tests.conftest import ALGORITHMS, make_arrays

FOLDER = Path(__file__).parent
OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
N_STEPS = 6


def small_model(cls):
    """A model of 157 to 909 weights; a planner is in its student stage."""
    policy_kwargs = {"net_arch": [8], "model_kwargs": {"network_kwargs": {"embedding_dim": 4}}}
    kwargs = {"policy_kwargs": policy_kwargs, "batch_size": 8, "buffer_size": 500, "seed": 0, "device": "cpu"}
    if cls is RACTD:
        kwargs |= {"policy_kwargs": {**policy_kwargs, "network": "mlp"}, "horizon": 4, "curriculum_steps": N_STEPS}
    # others than the defaults, which may change one day
    model = cls("MlpPolicy", dataset=make_arrays(), learning_rate=1e-3, max_grad_norm=5.0, **kwargs)
    return model.pretrain(N_STEPS)


def plain_options(model):
    """The options that JSON can hold; the warm-up is left out: after an offline phase there is none."""
    plain, options = (bool, int, float, str, type(None)), model.option_values()
    return {name: value for name, value in options.items() if type(value) in plain and name != "learning_starts"}


def write(folder):
    folder.mkdir()
    expected = {}
    for cls in ALGORITHMS:
        model = small_model(cls)
        # without the name of this machine's system
        with mock.patch("stable_baselines3.common.save_util.get_system_info", return_value=({}, "")):
            model.save(folder / cls.__name__)
        model.save_safe(folder / cls.__name__)
        actions = model.predict(OBSERVATIONS, deterministic=True)[0]
        expected[cls.__name__] = {"actions": actions.tolist(), "options": plain_options(model)}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(FOLDER / __version__)
