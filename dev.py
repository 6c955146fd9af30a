"""Run the example, the linters or the tests, or build the documentation; needs only Python and pip.

    python dev.py example [--framework torch|jax]
    python dev.py lint
    python dev.py test [options of pytest]
    python dev.py docs [options of Sphinx]

The first call builds .venv, which takes a minute or two; later calls find its stamp and start at once.
"""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"OptLayers needs Python 3.11 or newer; this is {sys.version.split()[0]}.")

import hashlib
import json
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed"
CONSTRAINTS = ROOT / "constraints.txt"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
RUNS = {
    "example": (("examples/polytope.py",), {}),
    "test": (("-m", "pytest", "-n", "2"), ONE_THREAD),
    "docs": (("-m", "sphinx", "-W", "--keep-going", "docs", "site"), ONE_THREAD),
}


def stage(title, *command):
    """Run `command` on one line, a dot every two seconds; its output is shown only if it fails."""
    print(title, end=" ", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, **streams) as process:
            while process.poll() is None:
                try:
                    process.wait(timeout=2)
                except subprocess.TimeoutExpired:
                    print(".", end="", flush=True)
        print(f" {time.monotonic() - start:.0f} s" if process.returncode == 0 else " failed:", flush=True)
        if process.returncode != 0:
            output.seek(0)
            sys.exit(output.read() + f"\nfailed: {' '.join(map(str, command))}")


def fingerprint():
    """Hash of all that decides what is in the environment, its own place included: it cannot be moved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parts = [project["build-system"], project["project"], CONSTRAINTS.read_text(encoding="utf-8")]
    return hashlib.sha256(json.dumps([*parts, sys.version_info[:2], str(ROOT)]).encode()).hexdigest()


def build():
    """Build .venv anew unless its stamp says that it is the one wanted."""
    wanted = fingerprint()
    if PYTHON.exists() and STAMP.is_file() and STAMP.read_text() == wanted:
        return
    stage("Making .venv", sys.executable, "-m", "venv", "--clear", VENV)
    pip = (PYTHON, "-m", "pip", "install", "--no-input", "-c", CONSTRAINTS)
    stage("Installing, a minute or two", *pip, "-e", ".[torch,jax,examples,docs,dev]")
    STAMP.write_text(wanted)


def main(job="", *options):
    """Build the environment, then do the job in it."""
    if job not in ("example", "lint", "test", "docs"):
        sys.exit(__doc__)
    build()
    if job == "lint":
        stage("ruff check", PYTHON, "-m", "ruff", "check")
        stage("ruff format --check", PYTHON, "-m", "ruff", "format", "--check")
        stage("pyright", PYTHON, "-m", "pyright", "--pythonpath", PYTHON)
    else:
        run, threads = RUNS[job]
        sys.exit(subprocess.run([PYTHON, *run, *options], cwd=ROOT, env=os.environ | threads).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
