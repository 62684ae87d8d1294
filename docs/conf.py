"""Configuration of the site: ``make docs`` builds it into build/docs."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import sb3_consistency

project = "sb3_consistency"
author = "The sb3_consistency contributors"
copyright = author
release = version = sb3_consistency.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "options_table",
    "public_names",
]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = f"sb3_consistency {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# `make notebooks` runs the examples; the site shows what it kept
nb_execution_mode = "off"
# quotes around strings are code
smartquotes = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_generate = True
autosummary_ignore_module_all = False
copybutton_exclude = ".linenos, .gp, .go"

# Links into other projects' sites need their inventories, hence the internet: SPHINX_INTERSPHINX=1 make docs
if os.environ.get("SPHINX_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "gymnasium": ("https://gymnasium.farama.org", None),
        "stable_baselines3": ("https://stable-baselines3.readthedocs.io/en/master", None),
    }
else:
    # what those inventories would know; a wrong name of our own is still a warning, and an error in `make docs`
    nitpick_ignore_regex = [
        (r"py:.*", r"(torch|th|numpy|np|gymnasium|gym|spaces|stable_baselines3|sb3_contrib|minari)\..*"),
        (r"py:.*", r"(pathlib|collections|typing|io|os)\..*"),
        (r"py:.*", r"(Env|VecEnv|BaseCallback|MaybeCallback|GymEnv|Schedule|Wrapper\w+|Controller)"),
        (r"py:.*", r"(str|int|float|bool|bytes|dict|list|tuple|set|type|object|None|Any|Path|Self|optional|callable)"),
        (r"py:.*", r"(ValueError|TypeError|KeyError|ImportError|OSError|RuntimeError|FileNotFoundError|FileExistsError)"),
    ]
