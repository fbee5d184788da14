"""4-bit, int8 and bf16 weights by the kernels for Hopper GPUs, against float64.

    python -m pytest tests/gpu/test_hopper_gpu.py -q
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a CUDA device of compute capability 9.0, and PyTorch sees none here", allow_module_level=True)

import kernels
from kernels.candidates import gated_hopper_candidates
from kernels.products import a16w4_hopper, a16w8_hopper, bf16_hopper
from kernels.products.a16w4_hopper import a16w4_hopper_partials
from kernels.products.a16w8_hopper import a16w8_hopper_partials
from kernels.products.bf16_hopper import bf16_hopper_partials
from kernels.tuning import HopperConfig
from tests.unit.kernels.checks import normal, relative_error

pytestmark = pytest.mark.gpu


def with_producer_and_ahead(*tiles: tuple[int, int, int, int, int]) -> list[HopperConfig]:
    return [
        HopperConfig(block_m, block_n, 1, warps, stages, producer, programs, ahead)
        for block_m, block_n, warps, stages, programs in tiles
        for producer in (False, True)
        for ahead in (0, 1, stages)
    ]


MANY = [
    HopperConfig(block_m, block_n, 1, warps, stages, producer)
    for block_m, block_n, warps, stages in (
        (256, 128, 8, 3), (256, 64, 4, 3), (128, 128, 4, 2), (128, 64, 4, 3), (64, 128, 4, 3), (64, 256, 8, 3),
    )
    for producer in (False, True)
] + [
    HopperConfig(64, 64, 1, 4, 3, True, 3, 3), HopperConfig(128, 64, 1, 4, 3, band=2),
    HopperConfig(64, 128, 1, 4, 3, True, band=3),
]  # fmt: skip
FEW = with_producer_and_ahead(
    (8, 64, 4, 8, 4), (8, 256, 4, 5, 2), (16, 128, 4, 5, 3), (16, 256, 8, 2, 2), (32, 128, 4, 4, 2)
)
INT8_MANY = [
    HopperConfig(block_m, block_n, 1, warps, stages, producer, programs)
    for block_m, block_n, warps, stages, programs in (
        (256, 128, 8, 2, 1), (128, 256, 8, 3, 1), (128, 128, 4, 2, 2), (128, 64, 4, 2, 2), (64, 128, 4, 3, 2),
        (64, 256, 8, 3, 1),
    )
    for producer in (False, True)
]  # fmt: skip
INT8_FEW = with_producer_and_ahead(
    (8, 64, 4, 4, 4), (8, 128, 4, 3, 3), (16, 128, 4, 5, 2), (16, 256, 8, 3, 1), (32, 128, 8, 4, 2)
)
BF16 = with_producer_and_ahead(
    (8, 64, 4, 6, 2), (8, 128, 8, 5, 1), (16, 128, 4, 2, 2), (64, 64, 4, 3, 2), (64, 256, 8, 2, 1)
)


@dataclass(frozen=True)
class Kernel:
    """A kernel under test: its format, and the tiles tried for x of m rows."""

    format: str
    run: Callable[..., Tensor]
    few: list[HopperConfig]
    many: list[HopperConfig]

    def configs(self, m: int) -> list[HopperConfig]:
        return self.few if m <= 32 else self.many

    def weight(self, n: int, k: int, seed: int = 1) -> kernels.PackedWeight:
        return kernels.pack_weight(normal((n, k), seed, "cuda").float() * 0.05 + 0.01, self.format, device="cuda")

    def whole(self, m: int, n: int, k: int) -> tuple[Tensor, kernels.PackedWeight]:
        """x and a weight whose products and sums float32 holds exactly, in 4 bits with every zero point and four
        scales."""
        draw = partial(torch.randint, generator=torch.Generator("cuda").manual_seed(m + n), device="cuda")
        x = draw(-4, 5, (m, k)).bfloat16()
        if self.format == "bf16":
            return x, kernels.pack_weight(draw(-16, 17, (n, k)).float(), "bf16", device="cuda")
        if self.format == "int8":
            held = kernels.QuantizedWeight("int8", draw(-128, 128, (n, k)).to(torch.int8), 2.0 ** draw(-1, 3, (n,)))
            return x, kernels.pack_weight(held, "int8", device="cuda")
        codes, zero = draw(0, 16, (n, k)).to(torch.uint8), draw(0, 16, (n, k // 128)).to(torch.uint8)
        scale = 2.0 ** draw(-1, 3, (n, k // 128)).float()
        plain = kernels.QuantizedWeight("int4", codes, scale, zero, 128)
        return x, kernels.pack_weight(plain, "int4", device="cuda")


INT4, PLAIN = Kernel("int4", a16w4_hopper_partials, FEW, MANY), Kernel("bf16", bf16_hopper_partials, BF16, BF16[-12:])
INT8 = Kernel("int8", a16w8_hopper_partials, INT8_FEW, INT8_MANY)
every = pytest.mark.parametrize("kernel", [INT4, INT8, PLAIN], ids=lambda kernel: kernel.format)


@pytest.fixture
def poisoned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in all that a kernel is to write."""
    empty = a16w4_hopper.new_partials

    def filled(steps: int, splits: int, m: int, n: int, device: torch.device) -> tuple[Tensor, int]:
        out, per_split = empty(steps, splits, m, n, device)
        return out.fill_(float("nan")), per_split

    for module in (a16w4_hopper, a16w8_hopper, bf16_hopper):
        monkeypatch.setattr(module, "new_partials", filled)


def poisoned_behind(x: Tensor) -> Tensor:
    """x with rows of NaN behind it."""
    return torch.cat((x, torch.full_like(x[:1].expand(256, -1), float("nan"))))[: len(x)]


def oracle(x: Tensor, weight: kernels.PackedWeight) -> Tensor:
    return x.double() @ weight.dequantize(torch.float64).t()


@every
@pytest.mark.usefixtures("poisoned_out")
@pytest.mark.parametrize("m", [1, 3, 8, 13, 16, 32, 33, 64, 65, 200, 256, 1000, 2048])
@pytest.mark.parametrize("n, k", [(4608, 4096), (320, 512), (200, 14336), (4612, 512)])  # 4612: out not by TMA
def test_products(kernel: Kernel, m: int, n: int, k: int) -> None:
    if kernel is PLAIN and m > 200:
        pytest.skip("bf16 goes to cuBLAS long before")
    x, weight = poisoned_behind(normal((m, k), m, "cuda")), kernel.weight(n, k)
    whole_x, whole_weight = kernel.whole(m, n, k)
    want, exact = oracle(x, weight), oracle(whole_x, whole_weight)
    for config in (replace(config, splits=splits) for config in kernel.configs(m) for splits in (1, 3)):
        parts = kernel.run(x, weight, config)
        assert parts.dtype == (torch.bfloat16 if len(parts) == 1 else torch.float32) and parts.shape[1:] == (m, n)
        assert relative_error(parts.double().sum(0), want) < 4e-3, config
        parts = kernel.run(poisoned_behind(whole_x), whole_weight, config)
        rounded = exact.bfloat16().double() if len(parts) == 1 else exact
        wrong = int((parts.double().sum(0) != rounded).sum())
        assert wrong == 0, f"{config}: {wrong} of {exact.numel()} elements differ"


@every
@pytest.mark.usefixtures("poisoned_out")
@pytest.mark.parametrize("m", [1, 5, 8, 16, 30, 33, 64])
def test_silu_mul_at_the_end(kernel: Kernel, m: int) -> None:
    n, k = 4608, 4096
    x, weight = poisoned_behind(normal((m, k), m, "cuda")), kernel.weight(n, k)
    gate, up = oracle(x, weight).chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up
    kind = {"int4": "gated planes", "int8": "gated pairs"}.get(kernel.format, "gated bf16")
    for config in gated_hopper_candidates(kind, m):
        got = kernel.run(x, weight, config, gated=True)
        assert got.shape == (1, m, n // 2) and relative_error(got[0].double(), want) < 4e-3, config


@every
@pytest.mark.parametrize("late", [False, True])
def test_behind_the_kernel_that_writes_x(kernel: Kernel, late: bool) -> None:
    """In a graph of norms and products, each let in before the one before it has ended: weights are read ahead, x must
    not be."""
    weights, norm = [kernel.weight(4608, 4096, seed) for seed in range(4)], torch.ones(4096, device="cuda").bfloat16()
    for config in (replace(c, splits=3, late=late) for c in kernel.few if c.ahead):
        sources = [normal((config.block_m, 4096), seed, "cuda") for seed in range(24)]
        want = []
        for i, source in enumerate(sources):
            x = kernels.rms_norm(source, norm, 1e-5)
            torch.cuda.synchronize()
            want.append(kernel.run(x, weights[i % 4], replace(config, ahead=0)))
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = [
                kernel.run(kernels.rms_norm(source, norm, 1e-5), weights[i % 4], config)
                for i, source in enumerate(sources)
            ]
        for _ in range(3):
            for parts in got:
                parts.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(torch.equal, got, want)), config


@pytest.mark.parametrize("m, late", [(300, False), (512, True)])  # ragged, and whole tiles
@pytest.mark.parametrize(
    "kernel, config", [(kernel, config) for kernel in (INT4, INT8) for config in kernel.many],
    ids=lambda value: value.format if isinstance(value, Kernel) else str(value),
)
def test_again_and_again(kernel: Kernel, config: HopperConfig, m: int, late: bool) -> None:
    """The same bits each time: behind kernels that fill the GPU, and behind each other, where a launch overlaps the end
    of the one before; and 3 splits of 32 groups are not of one length."""
    n, k = 4608, 4096
    config = replace(config, splits=3, late=late)
    problems = [(poisoned_behind(normal((m, k), seed, "cuda")), kernel.weight(n, k, 9 + seed)) for seed in range(4)]
    want = [kernel.run(x, weight, config) for x, weight in problems]
    for (x, weight), parts in zip(problems, want, strict=True):
        assert relative_error(parts.double().sum(0), oracle(x, weight)) < 4e-3
    large = normal((8192, 8192), 5, "cuda")
    torch.cuda.synchronize()
    for between in (True, False):
        got = []
        large @ large
        for i in range(20):
            got.append(kernel.run(*problems[i % 4], config))
            if between:
                large @ large
        torch.cuda.synchronize()
        differ = [i for i, parts in enumerate(got) if not torch.equal(parts, want[i % 4])]
        assert not differ, f"calls {differ} of 20 differ"


@pytest.mark.usefixtures("poisoned_out")
def test_x_that_tma_cannot_read_in_place() -> None:
    m, n, k = 70, 320, 1024
    held = torch.full((m * k + 9,), float("nan"), dtype=torch.bfloat16, device="cuda")
    x = held[1 : m * k + 1].view(m, k)
    x.copy_(normal((m, k), 2, "cuda"))
    assert x.data_ptr() % 16
    for kernel in (INT4, INT8, PLAIN):
        weight = kernel.weight(n, k)
        assert relative_error(kernel.run(x, weight, kernel.many[0])[0].double(), oracle(x, weight)) < 4e-3
