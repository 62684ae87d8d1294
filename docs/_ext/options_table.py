"""
The directive ``options``: a table of an algorithm's constructor arguments, made from where they are declared.

``{options} CPQL`` lists what not every algorithm has, ``{options} shared`` what all of them have.
"""

from __future__ import annotations

import inspect
import re
from math import isfinite
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from sb3_consistency.options import Option, options_of
from sb3_consistency.registry import ALGORITHMS, algorithm

POSITIONAL = {"policy", "env"}


def declared(cls: type) -> dict[str, Option]:
    """
    :param cls: an algorithm
    :return: the options that a user gives by name
    """
    return {name: o for name, o in options_of(cls).items() if name not in POSITIONAL and not name.startswith("_")}


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


def limits(option: Option) -> str:
    """
    :param option: a declared option
    :return: its range or its choices, in words; "" if it has none
    """
    if option.one_of:
        return "One of " + ", ".join(f"``{written(choice)}``" for choice in option.one_of) + "."
    if option.above is not None:
        return f"More than {option.above}."
    low, high = isfinite(option.low), isfinite(option.high)
    if low and high:
        return f"From {option.low} to {option.high}."
    if low:
        return f"At least {option.low}."
    return f"At most {option.high}." if high else ""


def sentence(text: str) -> str:
    """
    :param text: meaning of an option, as its declaration has it
    :return: the same as a sentence
    """
    return f"{text[:1].upper()}{text[1:]}." if text else ""


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
        rows = [(name, defaults[name], f"{sentence(option.doc)} {limits(option)}".strip()) for name, option in chosen.items()]
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
