"""A page for each script of examples/: its cells, and what its small form prints and draws.

Scripts run once, until they change. With `run_gallery` false, their pages show the cells alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
HEAD = "# Gallery\n\nEach script runs as it is; the pictures here are of its small form, `--quick`.\n\n"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def cells(source: str) -> list[tuple[bool, str]]:
    """The cells of a script, each with whether it is Markdown."""
    parts = re.split(r"^# %%(.*)\n", source, flags=re.M)[1:]
    result = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        is_text = "[markdown]" in head
        text = re.sub(r"^# ?", "", body, flags=re.M) if is_text else body
        if text.strip():
            result.append((is_text, text.strip("\n")))
    return result


def is_example(script: Path) -> bool:
    """Whether it starts with a cell of text; what examples import does not."""
    return script.read_text(encoding="utf-8").startswith("# %% [markdown]")


def run(script: Path, folder: Path) -> None:
    """Leave in `folder` what the small form of the script prints and draws."""
    source = script.read_text(encoding="utf-8")
    stamp = folder / "stamp"
    wanted = hashlib.sha256(source.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["--quick"] if '"--quick"' in source else []
    launcher = TWO_PROCESSES if "torchrun" in source else ()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *launcher, str(script), *options]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise ExtensionError(f"{script.name} failed:\n{result.stderr}")
    (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    stamp.write_text(wanted)


def write(path: Path, text: str) -> None:
    """Write the file only if that changes it: Sphinx reads pages anew by their times."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def page(script: Path, folder: Path) -> tuple[str, list[Path]]:
    """The page of a script, and its pictures."""
    (_, opening), *rest = cells(script.read_text(encoding="utf-8"))
    parts, pictures = [opening], sorted(folder.glob("*.png"))
    parts += [f"![What {script.name} draws]({folder.name}/{picture.name})" for picture in pictures]
    output = folder / "output.txt"
    if output.is_file() and output.read_text(encoding="utf-8").strip():
        parts.append(f"```none\n{output.read_text(encoding='utf-8').strip()}\n```")
    parts += [text if is_text else f"```py\n{text}\n```" for is_text, text in rest]
    parts.append(f"The whole script: {{download}}`{script.name} <../../examples/{script.name}>`.")
    return "\n\n".join(parts) + "\n", pictures


def card(script: Path, pictures: list[Path]) -> str:
    title = cells(script.read_text(encoding="utf-8"))[0][1].partition("\n")[0].lstrip("# ")
    image = f":img-top: {script.stem}/{pictures[0].name}\n" if pictures else ""
    return f":::{{grid-item-card}} {title}\n:link: {script.stem}\n:link-type: doc\n{image}:::"


def generate(app: Sphinx) -> None:
    scripts = [path for path in sorted((ROOT / "examples").glob("*.py")) if is_example(path)]
    target = Path(app.srcdir) / "gallery"
    target.mkdir(exist_ok=True)
    folders = [target / script.stem for script in scripts]
    if app.config.run_gallery:
        logger.info("running %d examples ...", len(scripts))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, scripts, folders))
    cards = []
    for script, folder in zip(scripts, folders, strict=True):
        text, pictures = page(script, folder)
        write(target / f"{script.stem}.md", text)
        cards.append(card(script, pictures))
    for stale in (
        set(target.glob("*.md")) - {target / f"{s.stem}.md" for s in scripts} - {target / "index.md"}
    ):
        stale.unlink()
    names = "\n".join(script.stem for script in scripts)
    grid = "::::{grid} 1 1 2 2\n:gutter: 3\n\n" + "\n\n".join(cards) + "\n::::\n"
    write(target / "index.md", f"{HEAD}{grid}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("run_gallery", True, "env", bool)
    app.connect("builder-inited", generate)
    return {"version": "1", "parallel_read_safe": True}
