"""Dependencies point one way: maths (torch only) <- glue <- algorithms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sb3_consistency"
STANDARD = sys.stdlib_module_names
RULES = {
    "generative": {"torch", "sb3_consistency.generative"},
    "value_losses.py": {"torch"},
    "offline/checks.py": {"numpy"},
    "offline/episodes.py": {
        "sb3_consistency.data.checks",
        "numpy",
        "gymnasium",
        "minari",
        "gymnasium_robotics",
        "stable_baselines3",
    },
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {name for name in names if name.split(".")[0] not in STANDARD}


@pytest.mark.parametrize("place", RULES)
def test_only_allowed_imports(place):
    root = PACKAGE / place
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        for name in imports(path):
            assert any(name == allowed or name.startswith(f"{allowed}.") for allowed in RULES[place]), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("common", "algorithms"),
        ("offline", "common"),
        ("offline", "algorithms"),
        ("common", "__main__"),
        *((lower, "zoo") for lower in ("common", "offline", "algorithms", "generative", "benchmark")),
    ],
)
def test_lower_layers_do_not_know_upper_ones(lower, upper):
    for path in (PACKAGE / lower).rglob("*.py"):
        assert not any(name.startswith(f"sb3_consistency.{upper}") for name in imports(path)), path


def test_importing_the_package_does_not_import_torch():
    code = "import sys, sb3_consistency; sb3_consistency.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rl_zoo3_is_imported_only_by_registering():
    # it changes Gymnasium
    code = "import sys, sb3_consistency.zoo, sb3_consistency.__main__; sys.exit('rl_zoo3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_stay_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
