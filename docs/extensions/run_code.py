"""Runs every `python` block of the Markdown pages; what it prints, returns and draws follows it on the page.

Blocks of a page share their variables. A block in a tab belongs to that tab, and sees the blocks outside tabs
and those of tabs with the same name; outside, code goes on with the variables of the first tab. A class in
front of a block, as in `{.hidden}`, says more:

    hidden      the block is run, but only its output is shown
    raises      the block has to raise; the error is its output

Warnings count as errors. Code that is not to be run, of other libraries, is marked `py`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import random
import sys
import time
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)
FIRST_TAB = "PyTorch"
FULL_WIDTH = 7.2  # inches of a figure as wide as the text


def reset() -> None:
    """The state that each page starts from, in all libraries that a page before it may have changed."""
    import jax
    import matplotlib
    import numpy as np
    import torch

    matplotlib.use("Agg")
    matplotlib.rcdefaults()
    matplotlib.rc_file(Path(__file__).with_name("pictures.rc"), use_default_template=False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", False)


class Page:
    """The variables of one page: a module for each kind of tab; the first one serves outside of tabs."""

    def __init__(self, name: str, path: str):
        self.name, self.path = name, path
        self.modules: dict[str, types.ModuleType] = {}
        self.common: dict[str, Any] = {}

    def run(self, code: str, line: int, tab: str | None) -> str:
        """What the block at `line` of the page prints, and the value of its last expression."""
        variables = self._variables(tab or FIRST_TAB)
        before = dict(variables)
        tree = ast.parse("\n" * line + code, self.path)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # of torch's own code
            exec(compile(tree, self.path, "exec"), variables)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), self.path, "eval"), variables)
                is_picture = type(value).__module__.startswith("matplotlib")
                if value is not None and not is_picture:
                    print(repr(value))
        if tab is None:
            new = {key: value for key, value in variables.items() if before.get(key, self) is not value}
            self.common |= new
            for module in self.modules.values():
                vars(module).update(new)
        return printed.getvalue()

    def _variables(self, tab: str) -> dict[str, Any]:
        if tab not in self.modules:
            module = types.ModuleType(f"{self.name.replace('/', '_')}_{tab}")
            sys.modules[module.__name__] = module  # where dataclasses look for the names in annotations
            vars(module).update(self.common)
            self.modules[tab] = module
        return vars(self.modules[tab])


class RunCode(SphinxTransform):
    """Puts the outputs of the blocks of a page behind them."""

    default_priority = 200

    def apply(self, **kwargs: Any) -> None:
        path = str(self.env.doc2path(self.env.docname))
        blocks = [node for node in self.document.findall(nodes.literal_block) if _is_to_run(node, path)]
        if not blocks:
            return
        reset()
        page, start = Page(self.env.docname, path), time.process_time()
        for number, block in enumerate(blocks):
            self._run(page, block, number)
        seconds = time.process_time() - start
        logger.info("%s: %d blocks run in %.1f s", self.env.docname, len(blocks), seconds)

    def _run(self, page: Page, block: nodes.literal_block, number: int) -> None:
        try:
            text, error = page.run(block.astext(), block.line or 0, _tab(block)), None
        except Exception as caught:
            text, error = "", caught
        if (error is not None) != ("raises" in block["classes"]):
            wrong = "".join(traceback.format_exception(error)) if error else "nothing was raised"
            logger.warning("a block failed:\n%s", wrong, location=block)
        if error is not None:
            text = f"{type(error).__name__}: {error}"
        outputs: list[nodes.Node] = []
        if text := text.rstrip():
            outputs.append(nodes.literal_block(text, text, language="none", classes=["output"]))
        outputs += self._pictures(number)
        place = block.parent.index(block) + 1
        block.parent[place:place] = outputs
        if "hidden" in block["classes"]:
            block.parent.remove(block)

    def _pictures(self, number: int) -> list[nodes.Node]:
        """Save all open figures; the title of each is its text for those who do not see it."""
        from matplotlib import pyplot

        folder = Path(self.app.doctreedir).parent / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        images = []
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            name = f"{self.env.docname.replace('/', '-')}-{number}-{figure.number}.png"
            figure.savefig(folder / name)
            titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
            text = "; ".join(filter(None, titles))
            if not text:
                raise ExtensionError(f"{self.env.docname}: a figure without title has no text for the blind")
            uri = os.path.relpath(folder / name, Path(self.env.doc2path(self.env.docname)).parent)
            width = f"{100 * min(figure.get_figwidth() / FULL_WIDTH, 1):.0f}%"
            images.append(nodes.image(uri=uri, alt=text, width=width, classes=["picture"]))
        pyplot.close("all")
        return images


def _is_to_run(node: nodes.literal_block, path: str) -> bool:
    is_of_page = path.endswith(".md") and str(node.source or path) == path
    return is_of_page and node.get("language") == "python"


def _tab(node: nodes.Node) -> str | None:
    while node is not None:
        if isinstance(node, nodes.Element) and node.get("design_component") == "tab-item":
            return node[0].astext()
        node = node.parent
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(RunCode)
    return {"version": "1", "parallel_read_safe": False}
