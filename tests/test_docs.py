"""The documentation is built strictly, which runs the code of its pages; its links lead somewhere."""

import ast
import contextlib
import functools
import html
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "gallery" not in path.parts)
LANGUAGES = {"python", "py", "none", "sh"}
LOOK = Path(__file__).with_name("look.html")


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
    packages = "sphinx furo myst_parser sphinx_copybutton sphinx_design sphinx-mathjax-offline"
    for package in [*packages.split(), "torch", "jax", "matplotlib", "optax"]:
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
        assert faults(browser, tmp_path) == []


def search(browser, site, word):
    """Where the search of the site, run in the browser, finds the word."""
    page = rendered(browser, f"{(site / 'search.html').as_uri()}?q={word}")
    _, _, results = page.partition('id="search-results"')
    return set(re.findall(r'href="([^"]*)" data-score', results))


def faults(browser, site):
    """Formulas not set, pictures not shown and text too wide on the pages, as the browser shows them."""
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    script = LOOK.read_text(encoding="utf-8").replace("PAGES", json.dumps(pages))
    (site / LOOK.name).write_text(script, encoding="utf-8")
    with served(site) as address:
        page = rendered(browser, f"{address}/{LOOK.name}")
    (found,) = re.findall('<pre id="faults">(.*?)</pre>', page, re.S)
    return json.loads(html.unescape(found))


def rendered(browser, address):
    """The page at the address after its scripts have run, in a browser that finds no other host."""
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=60000")
    options += ("--window-size=1280,900", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    result = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=300)
    return result.stdout


@contextlib.contextmanager
def served(folder):
    """The address of a server of the folder: between files, the browser lets no page look into another."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_code_is_run_unless_marked(page):
    fences = re.findall(r"^[ \t]*```[ \t]*([^\n]*)$", page.read_text(encoding="utf-8"), re.M)
    opened = fences[::2]
    assert all(language in LANGUAGES or language.startswith("{") for language in opened), opened


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT / "docs")))
def test_no_section_comes_twice(page):
    headings = re.findall(r"^##+ .*$", page.read_text(encoding="utf-8"), re.M)
    assert len(headings) == len(set(headings)), headings


def test_what_is_imported_can_be_installed():
    """What pages, examples and tests import, a dependency or an extra names: it does not just come along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    declared |= {project["name"], "docutils"}  # extensions of Sphinx are written in docutils
    files = [path for folder in ("examples", "docs", "tests") for path in (ROOT / folder).rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    for page in PAGES:
        sources += re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    distributions = importlib.metadata.packages_distributions()
    for name in {name.split(".")[0] for name in names}:
        owners = {owner.lower().replace("_", "-") for owner in distributions.get(name, ())}
        assert not owners or declared & owners, name


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
