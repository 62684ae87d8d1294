"""
The code blocks of the documents, short enough to run: lengths written with an underscore (``10_000``) become 12.

``python tests/snippets.py README.md`` runs the first one; it needs nothing but the package.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"(?P<before>^<!-- not run: [^\n]+ -->\n)?^```(?P<language>[\w{}-]+)\n(?P<code>.*?)^```$", re.M | re.S)


class Snippet(NamedTuple):
    """A code block: its language, its text, its first line in the document, and whether it is marked as not to run."""

    language: str
    code: str
    line: int
    marked: bool


def snippets(path: Path) -> list[Snippet]:
    """
    :param path: a Markdown document
    :return: its code blocks in order
    """
    text = path.read_text()
    return [
        Snippet(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1, bool(match["before"]))
        for match in FENCE.finditer(text)
    ]


def shortened(code: str) -> str:
    """
    :param code: Python
    :return: the same with every number written with underscores replaced by 12
    """
    return re.sub(r"\b\d{1,3}(_\d{3})+\b", "12", code)


def run(snippet: Snippet, path: Path, names: dict) -> None:
    """
    :param snippet: a block of Python
    :param path: its document, for tracebacks
    :param names: global names, which it reads and adds to
    """
    # blank lines put the line numbers of a traceback right
    exec(compile("\n" * (snippet.line - 1) + shortened(snippet.code), str(path), "exec"), names)


if __name__ == "__main__":
    document = Path(sys.argv[1])
    first = next(snippet for snippet in snippets(document) if snippet.language == "python")
    run(first, document, {})
    print(f"ran the snippet at line {first.line} of {document}")
