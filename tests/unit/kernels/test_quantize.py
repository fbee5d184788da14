"""Quantizers on plain tensors: each is at least as good as rounding to nearest on what it says it lowers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import QuantizedWeight, quantize_weight
from kernels.formats.gptq import gptq
from kernels.formats.quantize import clip, clipped, group_moments, grouped, hqq, hqq_loss, on_grid, span
from kernels.formats.smoothing import awq_scales, fold_norm, search, smooth

N, K, TOKENS = 48, 256, 600


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(seed: int = 0) -> Tensor:
    """A weight with outliers, as trained ones have them."""
    return random(N, K, seed=seed) * (1 + 4 * (random(N, K, seed=seed + 1) > 2.2))


def correlated_inputs(seed: int = 5) -> Tensor:
    """[TOKENS, K] of far fewer directions than features, of very different strength."""
    mixed = random(TOKENS, 40, seed=seed) @ random(40, K, seed=seed + 1) + 0.3 * random(TOKENS, K, seed=seed + 2)
    return mixed * torch.logspace(-1, 1, K)[torch.randperm(K, generator=torch.Generator().manual_seed(seed))]


def moments_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def output_error(weight: Tensor, held: QuantizedWeight, x: Tensor) -> float:
    return float((x.double() @ (held.dequantize(torch.float64) - weight.double()).T).square().sum())


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [64, 128])
def test_the_span_is_the_grid_of_rounding_to_nearest(group_size: int) -> None:
    weight = heavy_tailed()
    w = grouped(weight, group_size)
    found, expected = on_grid(w, span(w)), quantize_weight(weight, "int4", group_size)
    for got, want in ((found.codes, expected.codes), (found.scale, expected.scale), (found.zero, expected.zero)):
        assert got is not None and want is not None and torch.equal(got, want)


@pytest.mark.parametrize("make", [lambda w, m: hqq(w), lambda w, m: clipped(w, m), lambda w, m: gptq(w, m)])
def test_results_are_ordinary_int4_weights(make: object) -> None:
    weight = heavy_tailed()
    weight[3] = 0.0  # a row without a range
    held = make(weight, moments_of(correlated_inputs()))  # type: ignore[operator]
    assert held.format == "int4" and held.group_size == 128 and held.order is None
    assert held.codes.dtype == held.zero.dtype == torch.uint8 and held.scale.dtype == torch.float32
    assert held.codes.max() <= 15 and held.zero.max() <= 15
    assert torch.equal(held.scale, held.scale.bfloat16().float()) and (held.scale > 0).all()
    assert (held.dequantize()[3] == 0).all()


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_hqq_is_never_worse_than_rounding_on_its_own_loss(p: float) -> None:
    weight = heavy_tailed()
    loss = {}
    for name, held in (("hqq", hqq(weight, 64, p=p)), ("rtn", quantize_weight(weight, "int4", 64))):
        loss[name] = hqq_loss(grouped(weight - held.dequantize(), 64), p)
    assert (loss["hqq"] <= loss["rtn"]).all()
    assert loss["hqq"].sum() < 0.95 * loss["rtn"].sum()


def test_hqq_takes_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed()
    whole = hqq(weight)
    monkeypatch.setattr("kernels.formats.quantize.HQQ_ELEMENTS", 7 * K)
    assert torch.equal(hqq(weight).codes, whole.codes)


def test_the_iterations_of_hqq_earn_their_time() -> None:
    weight = heavy_tailed()
    shrunk, refined = (
        float(hqq_loss(grouped(weight - hqq(weight, iterations=n).dequantize(), 128)).sum()) for n in (0, 12)
    )
    assert refined < shrunk


def test_group_moments_are_the_diagonal_blocks() -> None:
    moments = moments_of(correlated_inputs())
    blocks = group_moments(moments, 64)
    assert blocks.shape == (4, 64, 64)
    for i in range(4):
        assert torch.equal(blocks[i], moments[64 * i : 64 * i + 64, 64 * i : 64 * i + 64])


def test_clipping_lowers_the_error_of_each_groups_output() -> None:
    weight, x = heavy_tailed(), correlated_inputs()
    w = grouped(weight, 128)
    best, plain = clip(w, group_moments(moments_of(x), 128)), span(w)
    parts = x.unflatten(1, (-1, 128))
    loss = [
        torch.einsum("tgk,ngk->tng", parts, grid.round(w) - w).square().sum(0) for grid in (best, plain)
    ]  # [N, groups], with no moments in between
    assert (loss[0] <= loss[1] * (1 + 1e-4)).all()
    assert loss[0].sum() < 0.9 * loss[1].sum()


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("order", ["static", "group", "none"])
def test_gptq_halves_the_output_error_where_inputs_are_correlated(order: str, group_size: int) -> None:
    weight, x = heavy_tailed(), correlated_inputs()
    moments = moments_of(x)
    made_up_for = output_error(weight, gptq(weight, moments, group_size, order=order), x)
    nearest = output_error(weight, quantize_weight(weight, "int4", group_size), x)
    assert made_up_for < 0.5 * nearest
    assert made_up_for < output_error(weight, clipped(weight, moments, group_size), x)


def test_the_order_of_strength_beats_none() -> None:
    weight, x = heavy_tailed(), correlated_inputs()
    errors = {order: output_error(weight, gptq(weight, moments_of(x), order=order), x) for order in ("static", "none")}
    assert errors["static"] < errors["none"]


def test_uncorrelated_inputs_leave_gptq_nothing_to_make_up_for() -> None:
    weight = heavy_tailed()
    for order in ("static", "none"):
        held = gptq(weight, torch.eye(K), order=order, search=False)
        assert torch.equal(held.codes, quantize_weight(weight, "int4").codes)


@pytest.mark.parametrize("order", ["static", "group"])
def test_activation_order_is_an_exact_permutation(order: str) -> None:
    """Columns that come in another order, with their inputs, are rounded to the same values."""
    weight, x = heavy_tailed(), correlated_inputs()
    shuffle = torch.randperm(K, generator=torch.Generator().manual_seed(9))
    if order == "static":  # groups are neighbours: only within them may columns trade places
        shuffle = torch.cat([shuffle[shuffle // 128 == group] for group in range(2)])
    moments = moments_of(x.double())
    there = gptq(weight, moments, order=order).dequantize()
    shuffled = gptq(weight[:, shuffle], moments[shuffle][:, shuffle], order=order).dequantize()
    assert torch.equal(shuffled, there[:, shuffle])


def test_groups_in_activation_order_hold_the_strongest_columns_together() -> None:
    weight, x = heavy_tailed(), correlated_inputs()
    moments = moments_of(x)
    held = gptq(weight, moments, 64, order="group")
    assert held.order is not None and sorted(held.order.tolist()) == list(range(K))
    strongest = moments.diagonal().argsort(descending=True)
    for group in range(4):
        within = slice(64 * group, 64 * group + 64)
        assert held.order[within].tolist() == sorted(strongest[within].tolist())
    dense = (held.codes.float().unflatten(1, (4, 64)) - held.zero[..., None]) * held.scale[..., None]  # type: ignore[index]
    assert torch.equal(held.dequantize()[:, held.order], dense.flatten(1))


def test_features_that_never_come_are_rounded_to_nearest() -> None:
    weight, x = heavy_tailed(), correlated_inputs()
    x[:, 10:20] = 0.0
    held = gptq(weight, moments_of(x), order="static")
    spacing = held.scale[:, :1]  # type: ignore[index]
    gaps = (held.dequantize() - weight)[:, 10:20].abs() / spacing
    inside = held.codes[:, 10:20].clamp(1, 14) == held.codes[:, 10:20]
    assert (gaps[inside] <= 0.5 + 1e-5).all() and held.dequantize().isfinite().all()


# --- moving scale -----------------------------------------------------------------------------------------------------


def test_the_best_of_the_candidates_beats_no_scale_where_few_inputs_are_strong() -> None:
    weight = random(N, K)
    x = random(TOKENS, K, seed=2)
    x[:, ::37] *= 30.0

    def loss(scale: Tensor) -> float:
        held = quantize_weight(weight * scale, "int4")
        return float((x @ (held.dequantize() / scale - weight).T).square().mean())

    scale, least = search(awq_scales(x.abs().mean(0), weight, 128), loss)
    assert least < 0.7 * loss(torch.ones(K))
    assert scale[::37].mean() > 1.5 * scale.mean()


def test_candidates_begin_with_no_scale_and_are_balanced() -> None:
    candidates = list(awq_scales(random(K).abs(), heavy_tailed(), 64, points=5))
    assert len(candidates) == 9 and torch.equal(candidates[0], torch.ones(K))
    for scale in candidates:
        assert scale.isfinite().all() and float(scale.amax() * scale.amin()) == pytest.approx(1.0, rel=1e-4)


def test_smoothing_balances_inputs_and_columns() -> None:
    weight, largest = heavy_tailed(), torch.logspace(-1, 2, K)
    scale = smooth(largest, weight, alpha=0.5)
    assert torch.allclose(largest / scale, (weight * scale).abs().amax(0), rtol=1e-4)
    largest[7] = 0.0
    assert smooth(largest, weight)[7] == 1.0


def test_folding_into_a_norm_keeps_the_function_though_the_norm_is_rounded() -> None:
    weight, x = random(N, K).double(), random(20, K, seed=3).double()
    norm, scale = random(K, seed=4).bfloat16(), torch.rand(K) * 5 + 0.1
    norm[5] = 0.0
    folded, factor = fold_norm(norm, scale)
    assert torch.equal(folded, folded.bfloat16().float()) and not torch.equal(folded, norm.float())
    before, after = (x * norm) @ weight.T, (x * folded) @ (weight * factor).T
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)
    assert folded[5] == 0 and factor[5] == 1


def test_a_norm_that_would_overflow_keeps_its_column() -> None:
    norm, scale = torch.full((4,), 3.0).half(), torch.tensor([1e-6, 1.0, 1e9, 2.0])  # 3e6 and 3e-9 are none of float16
    folded, factor = fold_norm(norm, scale, torch.float16)
    assert folded.tolist() == [3.0, 3.0, 3.0, 1.5] and factor.tolist() == [1.0, 1.0, 1.0, 2.0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "moments", "options", "words"),
    [
        (torch.randn(4, 200), torch.eye(200), {}, "200 is not a multiple of 128"),
        (torch.full((4, 128), float("nan")), torch.eye(128), {}, "NaN"),
        (torch.randn(4, 128), torch.eye(64), {}, r"finite \[128, 128\]"),
        (torch.randn(4, 128), torch.full((128, 128), float("inf")), {}, r"finite \[128, 128\]"),
        (torch.randn(4, 128), -torch.eye(128), {}, "not positive definite.*damping"),
        (torch.randn(4, 128), torch.eye(128), {"order": "random"}, "static.*'random'"),
    ],
)
def test_gptq_refuses(weight: Tensor, moments: Tensor, options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gptq(weight, moments, **options)


def test_hqq_refuses_what_is_no_weight() -> None:
    with pytest.raises(ValueError, match="NaN"):
        hqq(torch.full((4, 128), float("inf")))
    with pytest.raises(ValueError, match="floating"):
        hqq(torch.ones(4, 128, dtype=torch.int64))
