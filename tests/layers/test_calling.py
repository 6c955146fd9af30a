"""What torch does around the call of a layer that it cannot trace, or whose precision it would lower."""

import pytest

torch = pytest.importorskip("torch")

# Compiling a function of tensors that are no leaves, torch warns itself of looking at their gradients.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

from frontends import FRONTENDS  # noqa: E402
from optlayers.torch import DEQ, fixed_point, implicit, odeint  # noqa: E402
from transform_layers import LAYERS  # noqa: E402
from transforms import Subject  # noqa: E402


@pytest.fixture
def cell():
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 3)
    return lambda z, x: torch.tanh(0.3 * linear(z) + x)


@pytest.fixture
def x():
    return torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()


def gradient(function, x):
    return torch.autograd.grad(function(x).square().sum(), x)[0]


def test_graph_breaks_at_an_equilibrium(cell, x):
    deq = DEQ(cell)
    model = lambda x: deq(torch.sin(x))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(gradient(compiled, x), gradient(model, x), rtol=0, atol=0)


def test_compiled_cell(cell, x):
    torch.compiler.reset()
    compiled = DEQ(torch.compile(cell, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(gradient(compiled, x), gradient(DEQ(cell), x))


@pytest.mark.parametrize("kind", ["DEQ", "fixed_point", "implicit", "odeint"])
def test_autocast_is_off_inside(kind, cell, x):
    """Half precision becomes float32, and what follows has the accuracy of float32."""
    layers = {
        "DEQ": DEQ(cell),
        "fixed_point": lambda h: fixed_point(cell, 0 * h, h),
        "implicit": implicit(lambda h: torch.sign(h) * h.abs() ** (1 / 3), lambda z, h: z**3 - h),
        "odeint": lambda h: odeint(lambda t, y: -y, h, torch.linspace(0, 1, 4))[1:3],
    }
    h = (x.detach() + 2).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = layers[kind](h)
        assert z.dtype == torch.float32
        (h_bar,) = torch.autograd.grad(z.square().sum(), h)
    expected = layers[kind](h.float())
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    torch.testing.assert_close(h_bar, torch.autograd.grad(expected.square().sum(), h)[0], rtol=0, atol=0)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace` is:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "SATLayer"])
def test_no_layer_is_traced_by_jit(layer):
    """A trace would go on with the matrices and numbers of steps of the data that it was made from.

    A SATLayer is called with its weights as arguments here, which torch itself refuses to trace.
    """
    layer = Subject(FRONTENDS["torch"](), LAYERS[layer]).layer
    with pytest.raises(NotImplementedError, match="trace"):
        torch.jit.trace(layer.function, tuple(layer.values), check_trace=False)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("layer", ["CvxpyLayer, SOCP", "solve_qp", "implicit"])
def test_linearized(layer):
    """torch.fx records the derivative at one tangent, and runs it at others."""
    call = Subject(FRONTENDS["torch"](), LAYERS[layer]).layer
    _, push = torch.func.linearize(call.flat, call.theta)
    for tangent in (torch.ones_like(call.theta), call.theta.cos()):
        expected = torch.func.jvp(call.flat, (call.theta,), (tangent,))[1]
        torch.testing.assert_close(push(tangent), expected, rtol=1e-8, atol=1e-10)


def test_sparse_problems_are_not_linearized():
    call = Subject(FRONTENDS["torch"](), LAYERS["solve_qp, sparse"]).layer
    with pytest.raises(NotImplementedError, match="cannot be traced into a graph"):
        torch.func.linearize(call.flat, call.theta)
