"""
References to classes by the names that users import.

Docstrings name what they mean where it is defined (``~sb3_consistency.data.checks.DatasetError``, or just
``DatasetError``); the reference documents it as ``sb3_consistency.DatasetError``. What is not public has no page: its
name stays, without a link, if it exists. Shapes in docstrings, (B, *E), are no emphasis.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from sb3_consistency.registry import ALGORITHMS, TOOLS

PUBLIC = {**ALGORITHMS, **TOOLS}
METHODS = "sb3_consistency.CPQL"


def exists(path: str) -> bool:
    """
    :param path: dotted name
    :return: whether it can be imported
    """
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    domain = env.domains.python_domain
    *_, name = target.split(".")
    candidates = [f"sb3_consistency.{name}"] if name in PUBLIC else []
    if node["reftype"] == "meth":
        candidates.append(f"{METHODS}.{name}")
    for candidate in candidates:
        found = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", candidate, node, content)
        if found is not None:
            return found
    if target.startswith("sb3_consistency.") and exists(target):
        return content
    return None


def escape_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [re.sub(r"(?<=[(, ])\*(?=\w[\w ]*[,)])", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", escape_shapes)
    return {"parallel_read_safe": True}
