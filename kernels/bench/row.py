"""One measured problem, how its result is checked, and how it is printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Ceilings:
    """What this GPU did in the same run: reading in TB/s, bf16 matrix products in TFLOP/s."""

    read: float
    matrix: float


@dataclass
class Row:
    """One measured problem. Fields that were not measured are None and are left out of the table."""

    op: str
    problem: str
    us: float
    error: float  # relative to float64 (float32 for large products), Frobenius
    partials_us: float | None = None
    tb_per_s: float | None = None
    tera_ops: float | None = None
    others: dict[str, float] = field(default_factory=dict)  # microseconds of other implementations of the same problem

    def shares(self, ceilings: Ceilings) -> dict[str, float]:
        """Of the ceilings; 8-bit products may exceed that of bf16."""
        read = {} if self.tb_per_s is None else {"of_read": self.tb_per_s / ceilings.read}
        return read if self.tera_ops is None else read | {"of_matrix": self.tera_ops / ceilings.matrix}

    def record(self, ceilings: Ceilings) -> dict[str, Any]:
        return asdict(self) | self.shares(ceilings)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def checked(error: float, bound: float, what: str) -> float:
    if not error < bound:
        raise AssertionError(f"{what}: relative error {error:.2e}, the bound is {bound:.0e}")
    return error


def line(row: Row, ceilings: Ceilings) -> str:
    shares = row.shares(ceilings)
    parts = [f"{row.op:18} {row.problem:36} {row.us:9.2f} us"]
    parts += [f"(partials {row.partials_us:.2f})"] if row.partials_us is not None else []
    parts += [f"{row.tb_per_s:.2f} TB/s, {shares['of_read']:.0%} of read"] if row.tb_per_s is not None else []
    if row.tera_ops is not None:
        parts.append(f"{row.tera_ops:.0f} Tera-op/s, {shares['of_matrix']:.0%} of matrix")
    parts += [f"error {row.error:.0e}"] if row.error else []
    return "  ".join(parts + [f"{name} {us:.2f}" for name, us in row.others.items()])
