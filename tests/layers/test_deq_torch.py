"""Cells that are modules of torch: parametrisations, dropout, weights that change, four kinds of cell."""

import pytest

from checks import assert_close

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils.parametrizations import spectral_norm, weight_norm  # noqa: E402

from optlayers.torch import (  # noqa: E402
    DEQ,
    ODE,
    Anderson,
    Broyden,
    NewtonKrylov,
    Picard,
    SATLayer,
    control_path,
    fixed_point,
)

TIGHT = {"tol": 1e-13, "max_iter": 200}


class Normalized(nn.Module):
    """A cell with both kinds of normalised weights and with dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.W, self.U = spectral_norm(nn.Linear(6, 6)), weight_norm(nn.Linear(3, 6))
        self.dropout = nn.Dropout(dropout)

    def forward(self, z, x):
        return torch.tanh(0.8 * self.dropout(self.W(z)) + self.U(x))


def make(cell, start=(6,), **options):
    return DEQ(cell, start, **TIGHT | options).double()


def inputs():
    torch.manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64)


def test_parametrisations_are_evaluated_once_per_solve():
    x, counts = inputs(), []
    deq = make(Normalized())
    for weight in (deq.cell.W.parametrizations.weight, deq.cell.U.parametrizations.weight):
        weight.register_forward_hook(lambda *_: counts.append(1))
    deq(x).sum().backward()
    assert len(counts) == 2


def test_gradient_through_parametrisations():
    """Against unrolling, in evaluation mode: no power iteration changes the weights between calls."""
    x = inputs()
    deq = make(Normalized()).eval()
    wanted = list(deq.parameters())
    actual = torch.autograd.grad(deq(x).square().sum(), wanted)
    expected = torch.autograd.grad(deq(x, unroll=150).square().sum(), wanted)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-9)


def test_dropout_is_drawn_once_per_solve():
    """The result is an equilibrium under one mask, of which a solve with the same seed knows the gradient."""
    x = inputs()
    deq = make(Normalized(dropout=0.4))
    deq.cell.W.eval()  # no power iterations
    wanted = list(deq.parameters())
    torch.manual_seed(1)
    z = deq(x)
    actual = torch.autograd.grad(z.square().sum(), wanted)
    torch.manual_seed(1)
    mask = deq.cell.dropout(torch.ones(4, 6, dtype=torch.float64))
    assert (mask == 0).any() and (mask > 1).any()
    expected = 0 * z.detach()
    for _ in range(200):
        expected = torch.tanh(0.8 * mask * deq.cell.W(expected) + deq.cell.U(x))
    assert_close(z.detach(), expected.detach(), 1e-11)
    for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        assert_close(a, e, 1e-9)


def test_dropout_differs_between_solves_and_leaves_the_generator_ahead():
    x, deq = inputs(), make(Normalized(dropout=0.4))
    torch.manual_seed(1)
    first, number = deq(x), torch.rand(1)
    assert (deq(x) - first).abs().max() > 1e-2
    torch.manual_seed(1)
    deq.cell.dropout(torch.ones(4, 6, dtype=torch.float64))
    assert torch.equal(number, torch.rand(1))


def test_module_is_as_it_was():
    x, deq = inputs(), make(Normalized())
    before = {name: id(p) for name, p in deq.named_parameters()}
    deq(x).sum().backward()
    assert before == {name: id(p) for name, p in deq.named_parameters()}
    assert all(p.grad is not None for p in deq.parameters())


class Model(nn.Module):
    def __init__(self, solve):
        super().__init__()
        self.linear, self.solve = nn.Linear(3, 3).double(), solve

    def forward(self, x):
        return self.solve(lambda z: torch.tanh(0.5 * self.linear(z) + x), x)


def iterate(f, x):
    z = 0 * x
    for _ in range(100):
        z = f(z)
    return z


def test_weights_given_for_one_call_are_those_of_its_gradient():
    """functional_call puts the module's own weights back before the backward pass."""
    x = inputs()
    model = Model(lambda f, x: fixed_point(f, 0 * x, **TIGHT))
    weights = {name: (0.3 * p).detach().requires_grad_() for name, p in model.named_parameters()}

    def gradient(solve):
        model.solve = solve
        z = torch.func.functional_call(model, weights, (x,))
        return torch.autograd.grad(z.square().sum(), list(weights.values()))

    actual = gradient(lambda f, x: fixed_point(f, 0 * x, **TIGHT))
    for a, e in zip(actual, gradient(iterate), strict=True):
        assert_close(a, e, 1e-11)


def test_weights_changed_before_the_backward_pass_raise():
    x = inputs()
    model = Model(lambda f, x: fixed_point(f, 0 * x, **TIGHT))
    loss = model(x).square().sum()
    with torch.no_grad():
        model.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inject, self.first = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, z, x):
        return 0.5 * self.norm(torch.relu(z + self.inject(x) + 0.1 * self.first(z)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(3, 8)

    def forward(self, z, x):
        return 0.3 * self.layer(z + self.embed(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 5)

    def forward(self, state, x):
        return self.cell(x, state)


CELLS = {
    "convolution": (Residual, (4, 6, 6), (2, 1, 6, 6)),
    "transformer": (Attention, (4, 8), (2, 4, 3)),
    "LSTM": (Recurrent, lambda x: (x.new_zeros(2, 5), x.new_zeros(2, 5)), (2, 3)),
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_equal_their_unrolling(name):
    """States of several axes and of several tensors, and the gradients of all parameters."""
    torch.manual_seed(0)
    kind, start, shape = CELLS[name]
    deq, x = make(kind(), start), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *deq.parameters()]

    def gradients(z):
        parts = z if isinstance(z, tuple) else (z,)
        return torch.autograd.grad(sum(part.square().sum() for part in parts), wanted)

    for a, e in zip(gradients(deq(x)), gradients(deq(x, unroll=300)), strict=True):
        assert_close(a, e, 1e-8)


@pytest.mark.parametrize("layer", [DEQ, ODE])
def test_lazy_modules_are_initialised(layer):
    cell = nn.Sequential(nn.LazyLinear(3), nn.Tanh())
    start = torch.ones(2, 3)
    if layer is DEQ:
        DEQ(_First(cell))(start)
    else:
        ODE(_Second(cell))(start, torch.tensor([0.0, 1.0]))
    assert type(cell[0]) is nn.Linear and cell[0].in_features == 3


class _First(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, z, x):
        return 0.1 * self.cell(z)


class _Second(_First):
    def forward(self, t, y):
        return 0.1 * self.cell(y)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), NewtonKrylov(), Picard()], ids=repr)
def test_fixed_points_have_the_dtype_of_the_data(solver):
    x = torch.ones(2, 3, dtype=torch.float32, requires_grad=True)
    z = fixed_point(lambda z: 0.3 * torch.cos(z) * x, torch.zeros_like(x), solver=solver)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert z.dtype == gradient.dtype == torch.float32


@pytest.mark.usefixtures("double_by_default")
def test_paths_and_probabilities_have_the_dtype_of_the_data():
    t, x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float32), torch.ones(3, 1, dtype=torch.float32)
    for kind in ("linear", "rectilinear", "hermite", "natural"):
        assert control_path(t, x, kind).evaluate(t[1]).dtype == torch.float32
    z = SATLayer(2, 3).float()(t[:2] / 2, torch.tensor([True, False]))
    z.sum().backward()
    assert z.dtype == torch.float32
