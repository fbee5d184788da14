"""The CPU implementations and the reference itself, against float64."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.unit.kernels import checks, checks_kv

FORMATS = ["bf16", "int8", "int4"]


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format, group_size", [("bf16", 128), ("int8", 128), ("int4", 128), ("int4", 64)])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("n, k", [(192, 256), (100, 384)])
def test_linear(m: int, n: int, k: int, format: str, group_size: int, impl: str) -> None:
    checks.check_linear(m, n, k, format, group_size, "cpu", impl=impl, bias=m == 5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [3, 40, 100])
def test_linear_integers_exact(format: str, m: int) -> None:
    checks.check_linear_exact(m, 80, 256, format, 128, "cpu", impl="aten")


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("head_dim, group, block_size", [(64, 3, 16), (128, 4, 64), (64, 1, 128)])
@pytest.mark.parametrize("lengths", [[130], [64, 64], [1, 0, 64, 130], [0, 0], [7, 300, 16, 32, 33]])
def test_decode(format: str, head_dim: int, group: int, block_size: int, lengths: list[int], impl: str) -> None:
    checks.check_decode(format, lengths, block_size, 2, group, head_dim, "cpu", impl=impl)


def test_decode_splits_a_wasteful_batch() -> None:
    checks.check_decode("bf16", [3000] + list(range(1, 24)), 16, 2, 2, 64, "cpu", impl="aten")


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", kernels.KV_FORMATS)
def test_constant_vectors(format: str, impl: str) -> None:
    checks_kv.check_constant(format, 16, 64, "cpu", impl=impl, order=None)


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("lengths", [[300], [64, 64], [200, 1, 17, 48]])
def test_an_outlier_channel(format: str, lengths: list[int], impl: str) -> None:
    checks_kv.check_outlier_channel(format, lengths, 64, "cpu", impl=impl)


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("head_dim, group, block_size", [(64, 3, 16), (128, 2, 128)])
def test_prefill(format: str, head_dim: int, group: int, block_size: int, impl: str) -> None:
    chunks = [(1, 40), (0, 20), (70, 90), (33, 33), (1, 1), (300, 300), (2, 41), (68, 100)]
    checks.check_prefill(format, chunks, block_size, 2, group, head_dim, "cpu", impl=impl)


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_write(format: str, head_dim: int) -> None:
    checks.check_write(format, 16, 2, head_dim, "cpu", impl="aten")


@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_elementwise(impl: str) -> None:
    checks.check_elementwise(5, 200, 6, 2, 64, "cpu", impl=impl)


def test_float32_and_float64_reference() -> None:
    x = torch.randn(3, 256, dtype=torch.float64)
    weight = kernels.pack_weight(torch.randn(64, 256), "int4", device="cpu")
    want = x @ weight.dequantize(torch.float64).t()
    assert torch.allclose(kernels.linear(x, weight, impl="torch"), want, atol=1e-12)
    assert torch.allclose(kernels.linear(x.float(), weight, impl="torch"), want.float(), atol=1e-4)


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("n, k", [(1, 1), (3, 7), (65, 24), (5, 40), (4, 200)])
def test_int8_takes_any_number_of_features(n: int, k: int, m: int) -> None:
    """ATen's operator reads 16 features at a time: it crashed, or multiplied what lies behind the operands."""
    checks.check_linear(m, n, k, "int8", 128, "cpu", impl="aten")


@pytest.mark.parametrize("format", kernels.WEIGHT_FORMATS)
@pytest.mark.parametrize("m", [3, 100])
def test_activations_may_be_a_transposed_view(format: str, m: int) -> None:
    weight = kernels.pack_weight(torch.randn(96, 128), format, device="cpu")
    x = torch.randn(128, m).bfloat16().t()
    for impl in ("aten", "torch"):
        assert torch.equal(kernels.linear(x, weight, impl=impl), kernels.linear(x.contiguous(), weight, impl=impl))


def test_partials_are_summed_as_by_the_reference() -> None:
    """CPU products give none, but the operations say that they take them."""
    partials, residual, weight = torch.randn(3, 5, 64), torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    for run in (
        lambda impl: kernels.add_rms_norm(partials, residual, weight, 1e-5, impl=impl),
        lambda impl: (kernels.silu_mul(partials, impl=impl),),
    ):
        for got, want in zip(run("aten"), run("torch"), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert checks.relative_error(got, want) < 4e-3
    layers = [kernels.allocate_kv("bf16", 1, 16, 1, 64, "cpu") for _ in range(2)]
    qkv, turn, slots = torch.randn(3, 5, 4 * 64), torch.randn(5, 2, 64), torch.arange(5)
    got, want = (
        kernels.rope_write(qkv, layer, slots, turn, impl=impl)
        for layer, impl in zip(layers, ("aten", "torch"), strict=True)
    )
    assert torch.equal(got, want) and torch.equal(layers[0].key, layers[1].key)


@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_a_sum_has_the_residuals_dtype(impl: str) -> None:
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64).bfloat16(), torch.randn(64)
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5, impl=impl)
    assert normed.dtype == total.dtype == torch.bfloat16
    assert torch.equal(total, (x + residual).bfloat16())


def test_float64_statistics_on_the_fast_path() -> None:
    x, weight = torch.randn(3, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    got, want = (kernels.rms_norm(x, weight, 1e-5, impl=impl) for impl in ("aten", "torch"))
    assert torch.allclose(got, want, rtol=1e-12, atol=0)


def test_rotation_by_bf16_is_computed_in_float32() -> None:
    turn, qkv, slots = torch.randn(3, 2, 64).bfloat16(), torch.randn(3, 4 * 64).bfloat16(), torch.arange(3)
    layers = [kernels.allocate_kv("bf16", 1, 16, 1, 64, "cpu") for _ in range(2)]
    for layer, impl in zip(layers, ("aten", "torch"), strict=True):
        kernels.rope_write(qkv, layer, slots, turn, impl=impl)
    assert torch.equal(layers[0].key, layers[1].key)


@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_a_gated_product_keeps_the_dimensions_of_its_input(impl: str) -> None:
    """The reference took [batch, tokens, 2I] for partials and summed the batch."""
    weight = kernels.pack_weight(torch.randn(96, 128), "int8", device="cpu")
    x = torch.randn(2, 5, 128).bfloat16()
    got = kernels.gated_linear(x, weight, impl=impl)
    assert got.shape == (2, 5, 48)
    assert torch.equal(got.flatten(0, 1), kernels.gated_linear(x.flatten(0, 1), weight, impl=impl))


@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_attention_refuses_to_write_where_it_does_not_fit(impl: str) -> None:
    cache = checks.fill_cache("bf16", [3, 20], 16, 2, 64, "cpu")
    q = checks.normal((2, 4, 64), 1, "cpu")
    for out in (q[:1], q.float(), torch.empty(2, 64, 4, dtype=q.dtype).transpose(1, 2)):
        with pytest.raises(ValueError, match="decode_attention: out must be contiguous"):
            kernels.decode_attention(q, cache.layer, cache.tables, cache.lengths, 0.1, out=out, impl=impl)
