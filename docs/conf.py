"""How Sphinx builds the site: ``make docs``."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

import lightning_flatlora
from recipes.report.options import parse

project = "lightning-flatlora"
author = "The lightning-flatlora developers"
copyright = f"2026, {author}"
version = release = lightning_flatlora.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "outreach"]

html_theme = "furo"
html_title = f"lightning-flatlora {release}"
# The repository's address, which CI knows; without it the front page has no link to it.
REPOSITORY = os.environ.get("REPOSITORY", "")
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Formulas are written as MathML, which browsers show without a script or a network.
html_math_renderer = "mathml"

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
    os.environ["COLUMNS"] = "88"  # argparse would take the terminal's width
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        parse(["--help"])
    file.parent.mkdir(exist_ok=True)
    file.write_text(text.getvalue(), encoding="utf-8")


write_report_help(Path(__file__).parent / "_build" / "report_help.txt")


CONTENTS = {
    "First steps": """
        start when_to_use tutorial choosing_rho callbacks qlora other_loops many_devices checkpoints serving faq
    """,
    "Recipes": """
        recipes/index recipes/instruction_tuning recipes/classification recipes/nlg recipes/vqa recipes/clip_fewshot
        recipes/clip_contrastive recipes/reproduce recipes/demo
    """,
    "Flatness": "flatness report baselines",
    "Study": "study cost",
    "Reference": "method api/index glossary compatibility changelog",
    "Development": "architecture contributing",
}
"""The pages of the site by their captions."""


def complete_front_page(app: Any, page: str, source: list[str]) -> None:
    """Add the contents and the repository's address to the front page, whose file is read on GitHub without them."""
    if page != app.config.root_doc:
        return
    link = f"[Repository]({REPOSITORY}) · " if REPOSITORY else ""
    front = source[0].replace("[Repository](../README.md) · ", link)
    for caption, pages in CONTENTS.items():
        lines = ["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages.split(), "```"]
        front += "\n" + "\n".join(lines) + "\n"
    source[0] = front


MATHML = LatexToMathML(fancy_error=False)


def write_formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, on lines of its own if it is a block."""
    block = isinstance(node, nodes.math_block)
    latex = f"\\begin{{aligned}}{node.astext()}\\end{{aligned}}" if block else node.astext()
    try:
        formula = MATHML.convert_with_local_state(latex, displaystyle=block)
    except LatexError as error:
        logging.getLogger(__name__).warning("%s in the formula %s", error, latex, location=node)
        raise nodes.SkipNode from error
    writer.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register what this file adds to Sphinx."""
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("source-read", complete_front_page)
