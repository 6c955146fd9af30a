"""Markdown reports with a section for each framework, of which a run replaces its own."""

import datetime
import importlib.metadata
import re
from pathlib import Path


def table(rows):
    """The lines of a table, of which the first row is the head."""
    head, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]


def write_section(path: Path, head: str, script: str, framework: str, lines, packages=("cvxpy",)):
    """Put the section of `framework` into the report at `path`, and leave the others."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in (framework, *packages))
    source = f"Written by `benchmarks/{script} --framework {framework}`"
    new = [f"## {framework}", "", f"{source} on {datetime.date.today()}, with {versions}.", "", *lines]
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = re.split(r"(?=^## )", old, flags=re.MULTILINE)[1:]
    kept = [text.strip() for text in sections if not text.startswith(f"## {framework}\n")]
    path.write_text("\n\n".join([head.strip(), *sorted([*kept, "\n".join(new)])]) + "\n", encoding="utf-8")
