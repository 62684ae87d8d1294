"""What the documents say: their code runs, what they name exists, and the reference is complete."""

import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import Logger, configure

import sb3_consistency
from sb3_consistency import CPQL, RACTD, ConsistencyBC
from sb3_consistency.registry import ALGORITHMS
from tests.snippets import run, shortened, snippets

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("[!_]*/*.md")),
]
CHECKED = [path for path in DOCUMENTS if "notebook" not in path.parts]
RUNNABLE = [path for path in CHECKED if any(s.language == "python" and not s.marked for s in snippets(path))]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Small data under the ids that the documents use."""
    pytest.importorskip("minari", reason="needs the extra offline")
    pytest.importorskip("mujoco", reason="needs the extra mujoco")
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        rng = np.random.default_rng(0)
        for level in ("medium", "expert"):
            sb3_consistency.record_dataset(
                f"mujoco/hopper/{level}-v0", gym.make("Hopper-v5"), lambda obs: rng.uniform(-1, 1, 3).astype(np.float32), 200
            )
    return folder


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_document_runs(path, datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in snippets(path):
        if snippet.language == "python" and not snippet.marked:
            run(snippet, path, names)


def test_lengths_are_shortened_and_nothing_else():
    assert shortened("learn(100_000, x=1000, y=3e-4, z_1_000=1_000)") == "learn(12, x=1000, y=3e-4, z_1_000=12)"


@pytest.mark.parametrize("path", CHECKED, ids=name_of)
def test_commands_name_what_exists(path):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    commands = {*re.findall(r"make ([a-z][\w-]*)`", path.read_text())}
    for snippet in snippets(path):
        if snippet.language == "bash":
            commands |= set(re.findall(r"^make ([a-z][\w-]*)", snippet.code, re.M))
            for script in re.findall(r"python ((?:examples|tests|docs)/\S+\.py)", snippet.code):
                assert (ROOT / script).is_file(), script
    assert commands <= targets, commands - targets


def anchors(path):
    """Of the headings of a document, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        found = path.parent / place if place else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_picture_is_shown():
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    for picture in (ROOT / "docs").rglob("*.png"):
        assert picture.name in text, f"no page shows {picture}"


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    missing = [name for name in sb3_consistency.__all__ if name != "__version__" and f"sb3_consistency.{name}" not in text]
    assert not missing
    assert all(f"{{options}} {name}\n" in (ROOT / "docs" / "options.md").read_text() for name in ALGORITHMS)


@pytest.fixture(scope="module")
def logged():
    """Every name that is logged by algorithms of each kind, offline and online, with held-out data and evaluations."""
    n, names = 200, set()
    rng = np.random.default_rng(0)
    data = {
        "observations": rng.normal(size=(n, 3)),
        "actions": rng.uniform(-2, 2, (n, 1)),
        "rewards": rng.normal(size=n),
        "next_observations": rng.normal(size=(n, 3)),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(n) % 50 == 49,
    }
    record = Logger.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Logger, "record", lambda self, key, *args, **kwargs: (names.add(key), record(self, key, *args, **kwargs))
        )
        for cls, options in (
            (ConsistencyBC, {}),
            (CPQL, {"value_mode": "iql", "bc_loss": "distill"}),
            (RACTD, {"horizon": 4}),
        ):
            model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, learning_starts=10, **options)
            model.load_dataset(data, heldout_fraction=0.25)
            model.set_logger(configure(format_strings=[]))
            evaluation = EvalCallback(gym.make("Pendulum-v1", max_episode_steps=5), n_eval_episodes=1, eval_freq=10, verbose=0)
            model.pretrain(30, log_interval=10, callback=evaluation if cls is CPQL else None)
            if cls is CPQL:
                model.learn(250, log_interval=1)
        # from scratch the policy is another one
        kwargs = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 10, "exploration": "transport"}
        CPQL("MlpPolicy", "Pendulum-v1", **kwargs).learn(250, log_interval=1)
    return names


def test_every_logged_name_is_explained(logged):
    text = (ROOT / "docs" / "logging.md").read_text()
    assert not [name for name in logged if f"`{name}`" not in text]


def test_every_explained_name_is_logged(logged):
    text = (ROOT / "docs" / "logging.md").read_text().split("## Every logged name")[1]
    explained = {
        name for row in text.splitlines() for name in re.findall(r"`(\w+/\w+)`", row.split("|")[1] if "|" in row else "")
    }
    # Pendulum-v1 knows no success, these data no reference returns, and the last comes from a callback of its own
    assert explained - logged == {"rollout/success_rate", "eval/success_rate", "eval/normalized_score", "eval/fqe"}


NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_have_the_code_of_their_scripts(path):
    script = (ROOT / "examples" / path.with_suffix(".py").name).read_text()
    cells = [cell for kind, cell in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script, re.M) if "markdown" not in kind]
    shown = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in shown] == [cell.strip() for cell in cells], "run make notebooks"
    assert any(cell["outputs"] for cell in shown)
