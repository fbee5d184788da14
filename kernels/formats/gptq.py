"""GPTQ: round one column after another, and let the columns still to come make up for each error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323: for inputs x with second moments H = mean(x xᵀ), the error
of a rounded column is spread over the remaining ones by the rows of the Cholesky factor of H⁻¹.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import Grid, clip, group_moments, grouped, span
from .weights import QuantizedWeight

ORDERS = ("static", "group", "none")


def gptq(weight: Tensor, moments: Tensor, group_size: int = 128, *, order: str = "static", damping: float = 0.01,
         search: bool = True) -> QuantizedWeight:
    """int4 of a weight [N, K] for inputs with second moments [K, K].

    order: in which columns are rounded, the ones with the strongest inputs first unless "none".
        "static": groups are neighbours, their grids fixed before the first column is rounded, so the result looks like
            any other int4 weight;
        "group": groups are formed in that order, each with the grid of its columns as they have become (activation
            order; the result carries `order`, and whoever multiplies by it gathers x first);
        "none": columns in their place, with such grids.
    damping: added to the diagonal of H, as a share of its mean. search: grids by `clip` instead of by extremes.
    ValueError: as `quantize_weight`; moments that are not finite or whose factorization fails.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, not {order!r}")
    w = grouped(weight, group_size).flatten(1).clone()
    k = w.shape[1]
    if moments.shape != (k, k) or not torch.isfinite(moments).all():
        raise ValueError(f"moments must be a finite [{k}, {k}] matrix, not {tuple(moments.shape)} or NaN")
    h = moments.to(w.device).double()
    strength = h.diagonal()
    columns = torch.arange(k, device=w.device)
    if order != "none":
        columns = strength.argsort(descending=True, stable=True)
    spans = None
    if order == "static":
        spans = _fit(w.unflatten(1, (-1, group_size)), h.float(), group_size, search)
    h = h[columns][:, columns]
    w = w[:, columns]
    factor = _factor(h, damping)
    codes = torch.empty_like(w, dtype=torch.uint8)
    scales, zeros = [], []
    for first in range(0, k, group_size):
        block = slice(first, first + group_size)
        if spans is None:
            own = _fit(w[:, None, block], h[block, block].float(), group_size, search)
            scales.append(own.scale[:, 0])
            zeros.append(own.zero[:, 0])
            local = Grid(own.scale[:, 0].expand(-1, group_size), own.zero[:, 0].expand(-1, group_size))
        else:
            which = columns[block] // group_size
            local = Grid(spans.scale[:, which, 0], spans.zero[:, which, 0])
        errors = _round_block(w[:, block], factor[block, block], local, codes[:, block])
        w[:, first + group_size :] -= errors @ factor[block, first + group_size :]
    if spans is not None:
        back = columns.argsort()
        return QuantizedWeight(
            "int4", codes[:, back].contiguous(), spans.scale[..., 0], spans.zero[..., 0].to(torch.uint8), group_size
        )
    scale, zero = torch.cat(scales, 1), torch.cat(zeros, 1).to(torch.uint8)
    if order == "none":
        return QuantizedWeight("int4", codes, scale, zero, group_size)
    places, within = columns.view(-1, group_size).sort(1)  # a group's columns in their order: one form for one weight
    within += torch.arange(0, k, group_size, device=w.device)[:, None]
    return QuantizedWeight("int4", codes[:, within.flatten()], scale, zero, group_size, places.flatten())


def _fit(w: Tensor, moments: Tensor, group_size: int, search: bool) -> Grid:
    return clip(w, group_moments(moments, group_size)) if search else span(w)


def _factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped H⁻¹, float32. An input that is always zero has no say in anything."""
    diagonal = h.diagonal()
    h = h + torch.diag(torch.where(diagonal > 0, damping * diagonal.mean(), 1.0))
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise ValueError(f"the inputs' second moments are not positive definite with damping {damping}; raise it")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def _round_block(w: Tensor, factor: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """Round the columns of w [N, G] in turn, into `codes`; the errors [N, G] in units of the factor's diagonal."""
    errors = torch.empty_like(w)
    w = w.clone()
    for i in range(w.shape[1]):
        scale, zero = grid.scale[:, i], grid.zero[:, i]
        column = (w[:, i] / scale + zero).round_().clamp_(0, 15)
        codes[:, i] = column
        errors[:, i] = (w[:, i] - (column - zero) * scale) / factor[i, i]
        w[:, i:] -= errors[:, i, None] * factor[i, i:]
    return errors
