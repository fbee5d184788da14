"""Moving scale between a weight and its inputs, before either is quantized.

A matrix W [N, K] gives the same output for x / s if its columns are multiplied by s. The division costs nothing where
what comes before can take it: the weight of a norm, or the rows of a linear layer whose output is x.

awq_scales   candidates that give columns with strong inputs more of the 4-bit grid (Lin et al. 2023, arXiv:2306.00978)
smooth       takes outliers out of x so that 8 bits hold it (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

AWQ_POINTS = 20


def awq_scales(activation: Tensor, weight: Tensor, group_size: int, points: int = AWQ_POINTS) -> Iterator[Tensor]:
    """float32 [K], `points` of each of two families: |x|^a, and |x|^a / |w|^(1-a), for a in [0, 1).

    activation [K]: mean |x|. The first candidate is 1, no scaling. |w| [K] is the mean over the rows of a weight's
    share in its group's largest. Each candidate is normalized so that its extremes lie evenly about 1.
    """
    size = weight.float().abs().unflatten(1, (-1, group_size))
    share = (size / size.amax(-1, keepdim=True).clamp_(min=1e-8)).flatten(1).mean(0)
    x = activation.float()
    for i in range(points):
        alpha = i / points
        yield _normalized(x.pow(alpha))
        if alpha > 0:
            yield _normalized(x.pow(alpha) / share.pow(1 - alpha).clamp_(min=1e-4))


def _normalized(scale: Tensor) -> Tensor:
    scale = scale.clamp(min=1e-4)
    return scale / (scale.amax() * scale.amin()).sqrt()


def search(candidates: Iterator[Tensor], loss: Callable[[Tensor], float]) -> tuple[Tensor, float]:
    """The candidate of least loss, the first of equals, and that loss."""
    found = [(loss(scale), i, scale) for i, scale in enumerate(candidates)]
    least, _, scale = min(found, key=lambda entry: entry[:2])
    return scale, least


def smooth(largest: Tensor, weight: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's scale [K]: max |x|^alpha / max |w|^(1 - alpha); 1 for an input or a column that is always zero.

    largest [K]: max |x| over the calibration text. alpha: how much of the difficulty moves from x to W.
    """
    x, w = largest.float(), weight.float().abs().amax(0)
    scale = x.pow(alpha) / w.pow(1 - alpha).clamp_(min=1e-8)
    return torch.where((x > 0) & (w > 0), scale, 1.0)


def fold_norm(norm: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(norm / scale rounded to `dtype`, the factor by which columns of the next weight must grow), both float32.

    The factor is what the rounded norm asks for, not `scale` itself: so the function stays the same to the last bits.
    A norm that holds 0 gives nothing to divide, and a quotient beyond `dtype` cannot be stored: both keep their column.
    """
    wide = norm.float()
    folded = (wide / scale).to(dtype).float()
    usable = (folded != 0) & folded.isfinite()
    return torch.where(usable, folded, wide), torch.where(usable, wide / folded, 1.0)
