# %% [markdown]
# # The fixed-point operator, whose gradient is a fixed-point operator
#
# What a deep equilibrium layer does, in one small tape of NumPy operations. The operator returns
#
#     z = f(z, theta),      found by iterating f.
#
# For a cotangent g of z, implicit differentiation asks for w with
#
#     w = g + (df/dz)' w,    and then    theta_bar = (df/dtheta)' w.
#
# That is a fixed point again, of a map that is linear in w: the operator's gradient calls the operator. What
# it finds is compared with OptLayers, with the closed form and with differences.
#
#     python examples/fixed_point_operator.py [--framework torch|jax] [--seed 0]

# %%
import argparse
import sys

import numpy as np

IS_NOTEBOOK = "ipykernel" in sys.modules

# %% [markdown]
# ## The tape


# %%
class Var:
    """An array that remembers how it was made: its parents, and its cotangent to theirs."""

    def __init__(self, value, parents=(), pullback=None):
        self.value, self.parents, self.pullback = np.asarray(value, float), parents, pullback

    def __add__(self, other):
        return Var(self.value + other.value, (self, other), lambda g: (g, g))

    def __matmul__(self, other):
        a, b = self.value, other.value
        return Var(a @ b, (self, other), lambda g: (g @ b.T, a.T @ g))


def tanh(x):
    y = np.tanh(x.value)
    return Var(y, (x,), lambda g: (g * (1 - y**2),))


def gradients(output, cotangent, wanted):
    """The cotangents of the variables `wanted`, for that of `output`."""
    bars, order = {}, []

    def visit(v):
        if id(v) not in bars:
            bars[id(v)] = np.zeros_like(v.value)
            for parent in v.parents:
                visit(parent)
            order.append(v)

    visit(output)
    bars[id(output)] = cotangent
    for v in reversed(order):
        if v.pullback is not None:
            for parent, bar in zip(v.parents, v.pullback(bars[id(v)]), strict=True):
                bars[id(parent)] = bars[id(parent)] + bar
    return [bars.get(id(v), np.zeros_like(v.value)) for v in wanted]


# %% [markdown]
# ## The operator


# %%
class FixedPointOp:
    """(start, theta) to z = f(z, theta); its gradient calls a `FixedPointOp`."""

    def __init__(self, f, tol=1e-14, max_iter=1000):
        self.f, self.tol, self.max_iter = f, tol, max_iter

    def __call__(self, start, *theta):
        z = np.asarray(start, float)
        for _ in range(self.max_iter):
            last, z = z, self.f(Var(z), *theta).value
            if np.abs(z - last).max() <= self.tol * (1 + np.abs(z).max()):
                return Var(z, theta, lambda g, z=z: self.gradient(z, theta, g))
        raise RuntimeError(f"no fixed point after {self.max_iter} iterations")

    def gradient(self, z, theta, g):
        at = Var(z)
        image = self.f(at, *theta)
        adjoint = FixedPointOp(lambda w: Var(g + gradients(image, w.value, [at])[0]), self.tol, self.max_iter)
        return gradients(image, adjoint(g).value, theta)


# %% [markdown]
# ## The comparison
#
# Two maps: z = z A + x, of which all is known in closed form, and the cell z = tanh(z A + x).


# %%
def by_library(framework, cell, A, x, weights):
    """z and the gradients of sum(weights * z) in A and x, by OptLayers."""
    if framework == "torch":
        import torch

        from optlayers.torch import fixed_point

        A, x = (torch.tensor(v, requires_grad=True) for v in (A, x))
        act = torch.tanh if cell == "tanh" else lambda v: v
        z = fixed_point(lambda z: act(z @ A + x), torch.zeros_like(x), tol=1e-14, max_iter=200)
        (z * torch.from_numpy(weights)).sum().backward()
        return [v.detach().numpy() for v in (z, A.grad, x.grad)]
    import jax

    from optlayers.jax import fixed_point

    jax.config.update("jax_enable_x64", True)
    act = jax.numpy.tanh if cell == "tanh" else lambda v: v

    def loss(A, x):
        z = fixed_point(lambda z: act(z @ A + x), jax.numpy.zeros_like(x), tol=1e-14, max_iter=200)
        return (weights * z).sum(), z

    (_, z), bars = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(A, x)
    return [np.asarray(v) for v in (z, *bars)]


def by_tape(cell, A, x, weights):
    """The same by `FixedPointOp`."""
    A, x = Var(A), Var(x)
    act = tanh if cell == "tanh" else lambda v: v
    z = FixedPointOp(lambda z, A, x: act(z @ A + x))(np.zeros_like(x.value), A, x)
    return [z.value, *gradients(z, weights, [A, x])]


def by_closed_form(A, x, weights):
    """The same for the linear map: z = x (I - A)^-1, x_bar = g (I - A')^-1, A_bar = z' x_bar."""
    inverse = np.linalg.inv(np.eye(len(A)) - A)
    z, x_bar = x @ inverse, weights @ inverse.T
    return [z, z.T @ x_bar, x_bar]


def by_differences(cell, A, x, weights, step=1e-5):
    """The same, with central differences of the fixed point for the gradients."""
    act = np.tanh if cell == "tanh" else lambda v: v

    def solve(A, x):
        z = np.zeros_like(x)
        for _ in range(500):
            z = act(z @ A + x)
        return z

    def slope(i, index):
        ends = []
        for h in (step, -step):
            inputs = [A.copy(), x.copy()]
            inputs[i][index] += h
            ends.append((weights * solve(*inputs)).sum())
        return (ends[0] - ends[1]) / (2 * step)

    bars = [
        np.array([slope(i, j) for j in np.ndindex(v.shape)]).reshape(v.shape) for i, v in enumerate((A, x))
    ]
    return [solve(A, x), *bars]


def compare(framework, seed):
    """Rows of the table: map, method, and the differences of z, A_bar and x_bar from the tape's."""
    rng = np.random.default_rng(seed)
    A, (x, weights) = rng.standard_normal((4, 4)), rng.standard_normal((2, 3, 4))
    A *= 0.7 / np.linalg.norm(A, 2)
    rows = []
    for cell in ("linear", "tanh"):
        tape = by_tape(cell, A, x, weights)
        others = {f"optlayers.{framework}": by_library(framework, cell, A, x, weights)}
        if cell == "linear":
            others["closed form"] = by_closed_form(A, x, weights)
        others["differences"] = by_differences(cell, A, x, weights)
        for name, values in others.items():
            errors = [np.abs(a - b).max() for a, b in zip(values, tape, strict=True)]
            rows.append((f"{cell}, {name}", *errors))
    return rows


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="A fixed-point operator whose gradient calls itself.")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    print("Largest differences from the tape's FixedPointOp")
    print(f"\n{'method':<28}{'z':>10}{'A_bar':>10}{'x_bar':>10}")
    for name, *errors in compare(arguments.framework, arguments.seed):
        print(f"{name:<28}" + "".join(f"{error:>10.1e}" for error in errors))
