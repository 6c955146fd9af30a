"""The relaxation of MAXSAT with learned clauses, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..docstring import continues
from ..layers.sat import SAT, SATSolution, sat_doc
from ..ops import torch as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver, Picard
from .calling import in_full_precision, not_traced

UNTRACEABLE = "SATLayer cannot be traced: its sweeps end when they have converged; call it outside the graph"


@continues(sat_doc)
class SATLayer(nn.Module):
    """
    `S` is a parameter of the module, drawn at random.

    Example:
        >>> import torch
        >>> from optlayers.torch import SATLayer
        >>> layer = SATLayer(variables=2, clauses=1)
        >>> with torch.no_grad():  # the clause "not both", for columns truth, first, second
        ...     _ = layer.S.copy_(torch.tensor([[-1.0, -1.0, -1.0]]))
        >>> z = layer(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]))
        >>> z.detach().round().tolist()
        [[1.0, 0.0]]
    """

    def __init__(
        self,
        variables: int,
        clauses: int,
        aux: int = 0,
        rank: int | None = None,
        *,
        solver: FixedPointSolver = Picard(),
        adjoint_solver: FixedPointSolver = Anderson(),
        tol: float | None = None,
        max_iter: int = 2000,
        order: int = 1,
        on_failure: str = "raise",
        seed: int = 0,
    ):
        super().__init__()
        self.settings = SAT(
            variables, clauses, aux, rank, solver, adjoint_solver, tol, max_iter, order, on_failure
        )
        dtype = torch.get_default_dtype()
        self.S = nn.Parameter(self.settings.scale * torch.randn(clauses, self.settings.size))
        directions = torch.as_tensor(self.settings.directions(seed), dtype=dtype)
        self.register_buffer("directions", directions)

    @not_traced(UNTRACEABLE)
    @in_full_precision
    def solve(self, z: Tensor, is_input: Tensor) -> SATSolution:
        """As `forward`, with the vectors, status and statistics; see `SATSolution`."""
        return self.settings(ops, self.S, self.directions, z, is_input)

    def forward(self, z: Tensor, is_input: Tensor) -> Tensor:
        """Probabilities (..., n) that the variables are true; those of inputs are z itself."""
        return self.solve(z, is_input).z

    def extra_repr(self) -> str:
        s = self.settings
        return f"variables={s.variables}, clauses={s.clauses}, aux={s.aux}, rank={s.vector_size}"
