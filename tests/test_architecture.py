"""What importing the package brings along; which room knows which is held by import-linter (``make lint``)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_consistency
from sb3_consistency import registry


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_importing_the_package_does_not_import_torch():
    assert run("import sys, sb3_consistency; sb3_consistency.__version__; sys.exit('torch' in sys.modules)") == 0


def test_rl_zoo3_is_imported_only_by_registering():
    # it changes Gymnasium
    assert run("import sys, sb3_consistency.zoo, sb3_consistency.__main__; sys.exit('rl_zoo3' in sys.modules)") == 0


def test_optional_packages_are_imported_only_when_they_are_used():
    blocked = ("minari", "rl_zoo3", "optuna", "onnx", "onnxscript", "matplotlib", "pandas", "scipy", "h5py")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import gymnasium, sb3_consistency
for name in sb3_consistency.__all__:
    getattr(sb3_consistency, name)
sb3_consistency.CPQL("MlpPolicy", "Pendulum-v1", learning_starts=5, policy_kwargs=dict(net_arch=[8])).learn(10)
"""
    assert run(code) == 0


def test_every_public_name_is_there():
    for name in sb3_consistency.__all__:
        assert getattr(sb3_consistency, name) is not None


def test_type_checkers_see_every_public_name_where_it_is():
    tree = ast.parse(Path(sb3_consistency.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if alias.asname is None}
    modules = {name: f"algorithms.{module}" for name, module in registry.ALGORITHMS.items()} | registry.TOOLS
    expected = {name: f"sb3_consistency.{module}" for name, module in modules.items()}
    assert {name: module for name, module in seen.items() if module != "typing"} == expected
    assert set(sb3_consistency.__all__) == {"__version__", *expected}


def test_lazy_attributes():
    assert set(dir(sb3_consistency)) == set(sb3_consistency.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        sb3_consistency.nothing  # noqa: B018
