"""The kernel for small quadratic programs: its results in Triton's interpreter, and that it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

CASES = Path(__file__).with_name("fused_in_interpreter.py")
COMPILATION = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from optlayers.ops.torch.fused import _kernel
integers = ("n", "m", "iterations", "rounds", "steps", "passes")
kinds = {"N": "constexpr", "M": "constexpr", "iterations_out": "*i64"} | dict.fromkeys(integers, "i32")
kinds |= {name: "i32" for name in _kernel.arg_names if name.endswith("_stride")}
signature = {name: kinds.get(name, "*fp64") for name in _kernel.arg_names}
source = ASTSource(_kernel, signature, {"N": 16, "M": 16})
assert compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1}).asm["cubin"]
"""


def run(*arguments, interpret):
    command, env = [sys.executable, *arguments], dict(os.environ, TRITON_INTERPRET=str(interpret))
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_in_the_interpreter():
    run("-m", "pytest", "-p", "no:cacheprovider", str(CASES), interpret=1)


@pytest.mark.slow
def test_compiles_for_a_gpu():
    """As far as machine code, which needs no GPU."""
    run("-W", "ignore", "-c", COMPILATION, interpret=0)


@pytest.mark.gpu
def test_on_a_gpu():
    """The same problems on the device, with and without the kernel."""
    from optlayers.torch import ADMM, solve_qp

    generator = torch.Generator().manual_seed(0)
    n, batch = 8, 256
    q = torch.randn(batch, n, dtype=torch.double, generator=generator).cuda()
    P, A = torch.eye(n).to(q), torch.cat([torch.eye(n), torch.ones(1, n)]).to(q)
    l, u = (torch.cat([torch.full((n,), bound), torch.ones(1)]).to(q) for bound in (0.0, 0.4))
    results = []
    for solver in (ADMM(), ADMM(fused=True)):
        point = q.clone().requires_grad_()
        x = solve_qp(P, point, A, l, u, solver=solver).x
        results.append((x, *torch.autograd.grad(x.square().sum(), point)))
    for a, b in zip(*results, strict=True):
        assert abs(a - b).max() < 1e-9
