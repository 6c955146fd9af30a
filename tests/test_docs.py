"""The documentation is built strictly, which runs the code of its pages; its links lead somewhere."""

import importlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "gallery" not in path.parts)
LANGUAGES = {"python", "py", "none", "sh"}


class Targets(HTMLParser):
    """What a page links to or shows, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.anchors, self.texts = path, [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        if tag == "img" and "picture" in attributes.get("class", ""):
            self.texts.append(attributes.get("alt"))


def broken(pages):
    """Links from the pages to files or anchors that do not exist."""
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                yield f"{page.path.name}: {link}"


def test_site(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "sphinx_design", "torch", "jax", "matplotlib"):
        pytest.importorskip(package)
    options = ("-q", "-W", "--keep-going", "-D", "run_gallery=0")
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = {path.resolve(): Targets(path.resolve()) for path in tmp_path.rglob("*.html")}
    assert list(broken(pages)) == []
    assert all(text for page in pages.values() for text in page.texts)

    jax, torch = (importlib.import_module(f"optlayers.{name}") for name in ("jax", "torch"))
    documented = set.union(*(page.anchors for page in pages.values()))
    assert {f"optlayers.torch.{name}" for name in torch.__all__} <= documented
    own = {name for name in jax.__all__ if getattr(jax, name) is not getattr(torch, name)}
    assert {f"optlayers.jax.{name}" for name in own} <= documented
    assert "CvxpyLayer" in (tmp_path / "searchindex.js").read_text(encoding="utf-8")
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        found = search(browser, tmp_path, "CvxpyLayer")
        assert {f"reference/{name}.html#optlayers.{name}.CvxpyLayer" for name in ("torch", "jax")} <= found


def search(browser, site, word):
    """Where the search of the site, run in the browser, finds the word."""
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000", "--dump-dom")
    address = f"{(site / 'search.html').as_uri()}?q={word}"
    result = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=300)
    _, _, results = result.stdout.partition('id="search-results"')
    return set(re.findall(r'href="([^"]*)" data-score', results))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_code_is_run_unless_marked(page):
    fences = re.findall(r"^[ \t]*```[ \t]*([^\n]*)$", page.read_text(encoding="utf-8"), re.M)
    opened = fences[::2]
    assert all(language in LANGUAGES or language.startswith("{") for language in opened), opened


@pytest.mark.filterwarnings("ignore")  # those of the other libraries
@pytest.mark.parametrize("library", ["cvxpylayers", "qpth", "jaxopt", "torchdeq", "torchdiffeq"])
def test_other_libraries_compute_the_same(library):
    """The columns of the page on moving from the library: what both assign is the same."""
    for package in (library, "torch", "jax"):
        pytest.importorskip(package)
    page = (ROOT / "docs" / "how-to" / "migrate.md").read_text(encoding="utf-8")
    section = page.split(f"## From {library}\n")[1].split("\n## ")[0]
    common, compared = {}, 0
    blocks = re.findall(r"^```(py|python)\n(.*?)^```", section, re.M | re.S)
    exec(blocks.pop(0)[1], common)
    for (left, theirs), (right, ours) in zip(blocks[::2], blocks[1::2], strict=True):
        assert (left, right) == ("py", "python")
        results = {**common}, {**common}
        exec(theirs, results[0])
        exec(ours, results[1])
        for name in set(results[0]) & set(results[1]) - set(common):
            pair = [value[name] for value in results]
            if all(hasattr(value, "dtype") for value in pair):
                values = [np.asarray(value.detach() if hasattr(value, "detach") else value) for value in pair]
                np.testing.assert_allclose(*values, atol=1e-3)
                compared += 1
    assert compared
