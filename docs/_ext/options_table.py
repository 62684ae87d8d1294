"""
The directive ``options``: a table of an algorithm's constructor arguments, made from where they are declared.

``{options} CPQL`` lists what not every algorithm has, ``{options} shared`` what all of them have.
"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from sb3_consistency.registry import ALGORITHMS, algorithm

POSITIONAL = {"policy", "env"}


def declared(cls: type) -> dict[str, Any]:
    """
    :param cls: an algorithm
    :return: its options by name, each with ``name``, ``default``, ``doc``, ``low``, ``high`` and ``one_of``
    """
    try:
        from sb3_consistency.options import options_of
    except ImportError:
        return _from_signatures(cls)
    return dict(options_of(cls))


def _from_signatures(cls: type) -> dict[str, Any]:
    """What signatures and docstrings tell, as long as options are not declared."""
    texts: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    import sb3_consistency.options as module

    for owner in [*cls.__mro__, *(value for value in vars(module).values() if inspect.isclass(value))]:
        text = inspect.cleandoc(owner.__doc__ or "") if owner.__module__.startswith("sb3_consistency") else ""
        for name, meaning in re.findall(r"^:param (\w+): (.*?)(?=^:|\Z)", text, re.M | re.S):
            texts.setdefault(name, " ".join(meaning.split()))
    for owner in cls.__mro__:
        if "__init__" in vars(owner):
            for name, parameter in inspect.signature(owner.__init__).parameters.items():
                if parameter.default is not parameter.empty and not name.startswith("_"):
                    defaults.setdefault(name, parameter.default)
    return {
        name: SimpleNamespace(name=name, default=default, doc=texts.get(name, ""), low=None, high=None, one_of=None)
        for name, default in defaults.items()
        if name not in POSITIONAL
    }


def shared_names() -> set[str]:
    """Names that every algorithm takes."""
    return set.intersection(*(set(declared(algorithm(name))) for name in ALGORITHMS))


def written(value: Any) -> str:
    """
    :param value: a default
    :return: as one would write it
    """
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__name__
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    return repr(value).replace("'", '"')


def limits(option: Any) -> str:
    """
    :param option: a declared option
    :return: its range or its choices, in words; "" if it has none
    """
    if option.one_of:
        return "One of " + ", ".join(f"``{written(choice)}``" for choice in option.one_of) + "."
    low, high = option.low, option.high
    if low is not None and high is not None:
        return f"From {written(low)} to {written(high)}."
    if low is not None:
        return f"At least {written(low)}."
    return f"At most {written(high)}." if high is not None else ""


class OptionsTable(Directive):
    """A table of the options of an algorithm, or of those that all have."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        which = self.arguments[0]
        shared = shared_names()
        if which == "shared":
            defaults: dict[str, list[str]] = {}
            tables = {name: declared(algorithm(name)) for name in ALGORITHMS}
            chosen = {name: option for name, option in next(iter(tables.values())).items() if name in shared}
            for name in chosen:
                defaults[name] = self._defaults({algo: written(table[name].default) for algo, table in tables.items()})
        else:
            chosen = {name: option for name, option in declared(algorithm(which)).items() if name not in shared}
            defaults = {name: [written(option.default)] for name, option in chosen.items()}
        rows = [(name, defaults[name], f"{option.doc} {limits(option)}".strip()) for name, option in chosen.items()]
        return [self._table(rows)]

    @staticmethod
    def _defaults(by_algorithm: dict[str, str]) -> list[str]:
        """The commonest default first, then whose differ."""
        values = list(by_algorithm.values())
        common = max(dict.fromkeys(values), key=values.count)
        others: dict[str, list[str]] = {}
        for name, value in by_algorithm.items():
            if value != common:
                others.setdefault(value, []).append(name)
        return [common, *(f"{', '.join(names)}: {value}" for value, names in others.items())]

    def _table(self, rows: list[tuple[str, list[str], str]]) -> nodes.table:
        table = nodes.table(classes=["options"])
        group = nodes.tgroup(cols=3)
        table += group
        group += [nodes.colspec(colwidth=width) for width in (22, 18, 60)]
        head, body = nodes.thead(), nodes.tbody()
        group += [head, body]
        head += self._row([nodes.paragraph(text=text) for text in ("option", "default", "meaning")])
        for name, defaults, text in rows:
            default = nodes.paragraph()
            default += nodes.literal(text=defaults[0])
            for other in defaults[1:]:
                default += nodes.inline(text=f" ({other})")
            meaning = nodes.paragraph()
            # docstrings are reStructuredText, pages Markdown
            text = re.sub(r":(\w+):`([^`]+)`", r"{py:\1}`\2`", text)
            parsed, messages = self.state.inline_text(text, self.lineno)
            meaning += [*parsed, *messages]
            literal = nodes.paragraph()
            literal += nodes.literal(text=name)
            body += self._row([literal, default, meaning])
        return table

    @staticmethod
    def _row(cells: list[nodes.paragraph]) -> nodes.row:
        row = nodes.row()
        for cell in cells:
            entry = nodes.entry()
            entry += cell
            row += entry
        return row


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("options", OptionsTable)
    return {"parallel_read_safe": True}
