"""How Sphinx builds the site: ``make docs``."""

import contextlib
import io
import os
from pathlib import Path

import lightning_flatlora
from recipes.report.options import parse

project = "lightning-flatlora"
author = "The lightning-flatlora developers"
copyright = f"2025, {author}"
version = release = lightning_flatlora.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "outreach"]

html_theme = "furo"
html_title = f"lightning-flatlora {release}"
html_show_sphinx = False

# The anchors of headings are those of GitHub, so that one link serves both places.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

# The tutorial is shown with the outputs that are stored in it; running it takes minutes, and a test does that.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"

# What a page lists is written by hand, so that it can be put in order; tests/test_docs.py finds what is missing.
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The links to other projects need a network, which the build must not depend on: DOCS_LINKS=1 switches them on.
# peft publishes no inventory of its objects, so the pages link to its documentation by address.
if os.environ.get("DOCS_LINKS") == "1":
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
    }


def write_report_help(file: Path) -> None:
    """Return what the report's command line prints, for a page to include."""
    os.environ["COLUMNS"] = "110"  # argparse would take the terminal's width
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        parse(["--help"])
    file.parent.mkdir(exist_ok=True)
    file.write_text(text.getvalue(), encoding="utf-8")


write_report_help(Path(__file__).parent / "_build" / "report_help.txt")
