"""Every Python block of the README runs as it stands, in an interpreter of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_readme_opens_with_both_frameworks():
    assert "from optlayers.torch import" in BLOCKS[0]
    assert "from optlayers.jax import" in BLOCKS[1]


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block_runs(code):
    for framework in re.findall(r"^import (torch|jax)$", code, re.M):
        pytest.importorskip(framework)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout
