"""
Runs the examples as notebooks, into docs/examples (`make notebooks`); the site shows them with what they printed and drew.

The scripts are the source: `# %%` begins a cell. A test holds that the notebooks have the scripts' code.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
# lines of a progress display, and seconds since the start: they tell how busy the machine was
NOISE = re.compile(r"^.*\bsteps \(\d+ %\).* per second.*\n|^ *\d+ s  (?=\w)", re.M)
# the third acts with a file that is given to it, the fifth takes an hour
NAMES = ("01_quickstart", "02_multimodality", "04_planner_modes", "06_pauses")


def executed(script: Path, folder: Path) -> nbformat.NotebookNode:
    """
    :param script: an example
    :param folder: where to run it
    :return: the notebook with its outputs
    """
    notebook = jupytext.read(script, fmt="py:percent")
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """
    :param notebook: an executed notebook
    :return: the same without what changes from run to run for no reason
    """
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.execution_count = None
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            shown = [output for output in cell.outputs if output.output_type == "display_data"]
            for output in shown:
                output.metadata.clear()
            text = NOISE.sub("", printed)
            cell.outputs = ([nbformat.v4.new_output("stream", text=text)] if text else []) + shown
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(EXAMPLES, folder, dirs_exist_ok=True)
            notebook = executed(EXAMPLES / f"{name}.py", Path(folder))
        nbformat.write(tidied(notebook), DOCS / "examples" / f"{name}.ipynb")
