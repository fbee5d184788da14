"""One measured problem, how its result is checked, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


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


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def checked(error: float, bound: float, what: str) -> float:
    if not error < bound:
        raise AssertionError(f"{what}: relative error {error:.2e}, the bound is {bound:.0e}")
    return error


def print_row(row: Row) -> None:
    parts = [f"{row.op:18} {row.problem:36} {row.us:9.2f} us"]
    parts += [f"(partials {row.partials_us:.2f})"] if row.partials_us is not None else []
    parts += [f"{row.tb_per_s:.2f} TB/s"] if row.tb_per_s is not None else []
    parts += [f"{row.tera_ops:.0f} Tera-op/s"] if row.tera_ops is not None else []
    parts += [f"error {row.error:.0e}"] if row.error else []
    parts += [f"{name} {us:.2f}" for name, us in row.others.items()]
    print("  ".join(parts), flush=True)
