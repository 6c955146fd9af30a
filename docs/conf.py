"""Settings of the documentation; `python dev.py docs` builds it into site/.

Sphinx, since the field's libraries (PyTorch, JAX, CVXPY) use it, and since it imports the docstrings, which
OptLayers composes when it is imported. The code of all pages is run by `extensions/run_code.py` in one
process: a Jupyter kernel for each page would import both frameworks anew, and could not run code in tabs.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]
# Before JAX is imported: several times faster to compile, which is what most of a page's time goes to.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_llvm_disable_expensive_passes=true",
)

import optlayers  # noqa: E402

project = "OptLayers"
author = "The OptLayers authors"
copyright = author
version = release = optlayers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "gallery",
    "run_code",
    "sphinx-mathjax-offline",  # the site shows its formulas without a network
]
exclude_patterns = ["extensions"]
nitpicky = True
# Only our own names have a place to link to; signatures also name those of the frameworks.
nitpick_ignore_regex = [("py:.*", r"(?!optlayers\.(torch|jax)\.[A-Za-z]+$).*")]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "OptLayers"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False
pygments_style = "tango"
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#c2480a", "color-brand-content": "#1864ab"},
    "dark_css_variables": {"color-brand-primary": "#ff922b", "color-brand-content": "#74c0fc"},
}
copybutton_selector = "div:not(.output) > div.highlight > pre"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
