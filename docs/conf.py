"""Sphinx: the pages are Markdown (MyST) and notebooks, the API pages come from the docstrings."""

import re
from importlib import metadata

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "sj-taid"
author = "sj-taid developers"
version = release = metadata.version("sj-taid")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# The notebooks are committed without outputs, which are made here.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"
html_theme = "furo"
html_title = "sj-taid"
html_math_renderer = "mathml"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # Lightning's are long, and written for its own pages
# Every name of this project that a docstring refers to is on a page. Others' are not looked for.
nitpicky = True
nitpick_ignore_regex = [("py:(class|meth)", r"(?!sj_taid\.).*")]
napoleon_use_ivar = True
napoleon_use_rtype = False


def as_mathml(text, display="block"):
    """A formula as MathML; one of several lines, as in a docstring, is aligned.

    Raises:
        ValueError: a sign of LaTeX would be left, for a reader to see.
    """
    # As latex2mathml knows them.
    text = text.strip().replace("aligned}", "align*}").replace(r"\_", "_")
    if r"\begin" not in text and re.search(r"\\\\|\n\s*\n", text):
        lines = re.sub(r"\n\s*\n", r" \\\\ ", text)
        text = rf"\begin{{align*}}{lines}\end{{align*}}"
    mathml = convert(text, display=display)
    if left := re.search(r">\s*(&|&amp;|&#x00026;|\\[^<]*)\s*<", mathml):
        raise ValueError(f"{left[1]} is not translated, of the formula {text}")
    return re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', mathml)


def setup(app):
    """Write formulas as MathML, which browsers draw without MathJax and thus without internet."""

    def render(display):
        def visit(translator, node):
            translator.body.append(as_mathml(node.astext(), display))
            raise SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", render("inline"), render("block"))
