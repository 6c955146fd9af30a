"""Docstrings of OptLayers, plain text with Google's headings, as reStructuredText.

Indented paragraphs become literal blocks, names of public objects in single backticks become links, and
characters that would be markup are escaped. Napoleon does the rest.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Example):$")
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")


def convert(lines: list[str], framework: str, public: set[str]) -> list[str]:
    """The lines of a docstring of `optlayers.<framework>`, converted."""
    result: list[str] = []
    section, before, is_literal = "", "", False
    for line in lines:
        is_indented = line.startswith(" ")
        if SECTION.match(line):
            section, is_literal = line, False
        elif line and not is_indented:
            section, is_literal = "", False
        elif line and is_indented and not section and not before and not is_literal:
            result += ["::", ""]
            is_literal = True
        is_verbatim = is_literal or section == "Example:" or line == section
        result.append(line if is_verbatim else escape(line, framework, public))
        before = line
    return result


def escape(line: str, framework: str, public: set[str]) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    for i, part in enumerate(parts):
        name = part.strip("`")
        if i % 2 == 0:
            parts[i] = MARKUP.sub(r"\\\1", part)
        elif name.split("(")[0] in public:
            parts[i] = f":py:obj:`{name} <optlayers.{framework}.{name.split('(')[0]}>`"
        else:
            parts[i] = f"``{name}``"
    return "".join(parts)


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    import optlayers.jax
    import optlayers.torch

    if not name.startswith("optlayers."):
        return
    framework = "jax" if name.startswith("optlayers.jax") else "torch"
    own, shared = (optlayers.jax, optlayers.torch) if framework == "jax" else (optlayers.torch, optlayers.jax)
    public = set(own.__all__)
    if framework == "jax":  # what is the same object in both is documented once
        public = {x for x in public if getattr(own, x) is not getattr(shared, x)}
    lines[:] = convert(lines, framework, public)


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.napoleon")
    # Before Napoleon, which listens with the priority 500.
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"version": "1", "parallel_read_safe": True}
