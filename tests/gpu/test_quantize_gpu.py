"""Quantizing on the device gives what the CPU gives, and a model of 7B in a bounded memory.

    for m in rtn hqq; do python -m engine.quantize --model synthetic:7b --method $m --device cuda --json $m.json; done
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantize import quantize
from kernels import quantize_weight
from kernels.formats.gptq import gptq
from kernels.formats.quantize import clipped, hqq

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

N, K = 320, 512


def weight_and_moments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 60, generator=generator) @ torch.randn(60, K, generator=generator)
    x += 0.3 * torch.randn(800, K, generator=generator)
    return torch.randn(N, K, generator=generator), x.T @ x / len(x)


@pytest.mark.parametrize("method", ["hqq", "clipped", "gptq", "gptq group"])
def test_the_device_chooses_the_codes_of_the_cpu(method: str) -> None:
    weight, moments = weight_and_moments()
    run = {
        "hqq": lambda w, m: hqq(w),
        "clipped": clipped,
        "gptq": gptq,
        "gptq group": lambda w, m: gptq(w, m, order="group"),
    }[method]
    here, there = run(weight, moments).dequantize(), run(weight.cuda(), moments.cuda()).dequantize().cpu()
    if "gptq" not in method:  # whose later columns follow from every rounding before
        assert (here != there).float().mean() < 0.01
    errors = [float(((w - weight) @ moments * (w - weight)).sum()) for w in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    nearest = quantize_weight(weight, "int4").dequantize()
    if method != "hqq":
        assert errors[1] < 0.9 * float(((nearest - weight) @ moments * (nearest - weight)).sum())


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_memory_on_the_device_is_that_of_a_layer(method: str) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = quantize("synthetic:1.5b", method, device="cuda", bar=None)
    assert result.host_bytes > 1.5e9
    layer = 4 * sum(n * k for n, k in result.spec.linears().values())
    table = 2 * result.spec.vocab_size * result.spec.hidden_size
    assert torch.cuda.max_memory_allocated() - before < 6 * layer + 4 * table
