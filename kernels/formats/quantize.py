"""Choosing the 4-bit grid of a weight: scales and zero points better than those of its extremes.

A grid holds, for each group of `group_size` neighbours of K, a scale and a zero point; a weight is then rounded to
(code - zero) * scale, codes 0..15. `weights.quantize_weight` takes the grid that spans the group's extremes (RTN).
Here are two better ones:

hqq     from the weights alone: half-quadratic quantization (Badri & Shaji, 2023, mobiusml.github.io/hqq_blog)
clip    from the inputs' second moments: a range that gives up outliers where that lowers the output's error
        (the clipping search of AWQ, Lin et al. 2023, arXiv:2306.00978, on the layer's exact squared error)

HQQ as published lets the zero point be any real number. Ours are whole numbers 0..15, because that is what the layouts
of AWQ, GPTQ and compressed-tensors store (4 bits for a zero) and what the kernels' 16-bit planes read beside a scale;
so the half-quadratic step moves the scale, which may take any bfloat16 value, and the zero to its nearest whole number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import SMALLEST_SCALE, QuantizedWeight, check_groups, check_weight, usable

LEVELS = 15
HQQ_SHRINKS = (0.96, 0.92, 0.88, 0.84, 0.8, 0.76)
HQQ_ELEMENTS = 1 << 22  # weights refined at a time
CLIP_SHRINKS = tuple(1.0 - 0.025 * i for i in range(17))


@dataclass(frozen=True)
class Grid:
    """scale, zero: float32 [..., 1], one for each group; scales are bfloat16 values, zeros whole numbers 0..15."""

    scale: Tensor
    zero: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """Codes 0..15 of w [..., G], as float32."""
        return (w / self.scale).add_(self.zero).round_().clamp_(0, LEVELS)

    def round(self, w: Tensor) -> Tensor:
        """The values that w [..., G] rounds to."""
        return self.codes(w).sub_(self.zero).mul_(self.scale)

    def where(self, better: Tensor, other: Grid) -> Grid:
        """This grid where `better` [...], the other elsewhere."""
        chosen = better[..., None]
        return Grid(torch.where(chosen, self.scale, other.scale), torch.where(chosen, self.zero, other.zero))


def span(w: Tensor, shrink: float = 1.0) -> Grid:
    """The grid from the lowest to the highest of w [..., G], 0 included, both times `shrink`."""
    low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
    return _grid((high - low) * (shrink / LEVELS), -low * shrink)


def _grid(scale: Tensor, offset: Tensor) -> Grid:
    """offset: of the value 0 above the lowest code's."""
    scale = usable(scale.bfloat16().float())
    return Grid(scale, (offset / scale).round_().clamp_(0, LEVELS))


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[N, K] -> float32 [N, K/G, G]. ValueError for what cannot be quantized in such groups."""
    check_weight(weight)
    check_groups(weight.shape[1], group_size)
    return weight.float().unflatten(1, (-1, group_size))


def on_grid(w: Tensor, grid: Grid) -> QuantizedWeight:
    """int4 from w [N, K/G, G]."""
    codes = grid.codes(w).flatten(1).to(torch.uint8)
    return QuantizedWeight("int4", codes, grid.scale[..., 0], grid.zero[..., 0].to(torch.uint8), w.shape[-1])


def hqq_loss(error: Tensor, p: float = 0.7) -> Tensor:
    """Sum of |error|^p over the last dimension: what `hqq` lowers; outliers weigh less than in a squared error."""
    return error.abs().pow_(p).sum(-1)


def hqq(weight: Tensor, group_size: int = 128, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01,
        iterations: int = 12) -> QuantizedWeight:
    """int4 of a weight [N, K], no data needed; in each group the loss is at most that of rounding to nearest.

    From the best of some shrunk spans on, two steps in turn: the proximal operator of |.|^p takes the outliers out of
    the residual (in units of the scale, so that `beta` means the same for every group), then scale and zero fit what is
    left in the least squares sense. p, beta and kappa are the published ones; the shrunk spans are ours, for a whole
    zero moves too little from the extremes. Rows are taken some at a time, so that memory stays bounded.
    """
    w = grouped(weight, group_size)
    rows = max(1, HQQ_ELEMENTS // weight.shape[1])
    found = [_hqq(part, p, beta, kappa, iterations) for part in w.split(rows)]
    return on_grid(w, Grid(torch.cat([grid.scale for grid in found]), torch.cat([grid.zero for grid in found])))


def _hqq(w: Tensor, p: float, beta: float, kappa: float, iterations: int) -> Grid:
    best = span(w)
    least = hqq_loss(w - best.round(w), p)
    for shrink in HQQ_SHRINKS:
        best, least = _better(span(w, shrink), best, least, w, p)
    grid = best
    for i in range(iterations):
        grid = _half_quadratic_step(w, grid, beta * kappa**i, p)
        best, least = _better(grid, best, least, w, p)
    return best


def _better(grid: Grid, best: Grid, least: Tensor, w: Tensor, p: float) -> tuple[Grid, Tensor]:
    """Per group the grid of the lower loss, and that loss."""
    loss = hqq_loss(w - grid.round(w), p)
    better = loss < least
    return grid.where(better, best), torch.where(better, loss, least)


def _half_quadratic_step(w: Tensor, grid: Grid, beta: float, p: float) -> Grid:
    codes = grid.codes(w)
    in_units = w / grid.scale
    residual = in_units - (codes - grid.zero)
    size = residual.abs()
    outliers = residual.sign() * (size - size.clamp(min=1e-6).pow(p - 1) / beta).clamp_(min=0)
    target = in_units.sub_(outliers)
    zero = (codes - target).mean(-1, keepdim=True).round_().clamp_(0, LEVELS)
    centred = codes.sub_(zero)
    moved = (centred * target).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_(min=1e-6)
    scale = (grid.scale * moved.clamp_(0.5, 2.0)).bfloat16().float()
    return Grid(torch.where(scale >= SMALLEST_SCALE, scale, grid.scale), zero)


def clip(w: Tensor, moments: Tensor, shrinks: Iterable[float] = CLIP_SHRINKS) -> Grid:
    """Of the shrunk spans of w [N, groups, G], per group the one with the least squared error of the output.

    moments [groups, G, G]: mean of x xᵀ over the inputs x of each group; the error of a group's output is then
    dᵀ (x xᵀ) d for the rounding errors d, with no input at hand.
    """
    best, least = span(w), None
    for shrink in shrinks:
        grid = span(w, shrink)
        error = (grid.round(w) - w).transpose(0, 1)  # [groups, N, G]
        loss = (error @ moments).mul_(error).sum(-1).t()
        if least is None:
            best, least = grid, loss
        else:
            better = loss < least
            best, least = grid.where(better, best), torch.where(better, loss, least)
    return best


def group_moments(moments: Tensor, group_size: int) -> Tensor:
    """The diagonal blocks [K/G, G, G] of [K, K]."""
    blocks = moments.unflatten(1, (-1, group_size)).unflatten(0, (-1, group_size))  # [K/G, G, K/G, G]
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def clipped(weight: Tensor, moments: Tensor, group_size: int = 128) -> QuantizedWeight:
    """int4 of a weight [N, K], rounded to nearest in ranges chosen by `clip` for inputs with `moments` [K, K]."""
    w = grouped(weight, group_size)
    return on_grid(w, clip(w, group_moments(moments.float(), group_size)))
