"""The KV codecs on a CUDA device: bits of the reference, all roundings of e4m3, exact answers, an engine per format.

    python -m tests.gpu.test_kv_gpu          microseconds of decode attention by format and configuration
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import kernels
from engine import Engine, EngineConfig
from engine.model.kv_plan import KVPlan
from engine.sampling_params import SamplingParams
from kernels.measuring import problems
from kernels.measuring.chain import BLOCK, chain
from kernels.measuring.timing import microseconds
from kernels.paged import codec_triton, decode_triton, kv_cache_triton
from kernels.tuning import DecodeConfig, decode_config

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and PyTorch sees none here", allow_module_level=True)

from tests.unit.kernels import checks, checks_kv

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", checks_kv.CODECS)
@pytest.mark.parametrize("rows, head_dim", [(1, 64), (1, 128), (4, 128)])
def test_encode(name: str, rows: int, head_dim: int) -> None:
    checks_kv.check_encode(name, rows, head_dim, "cuda")


def test_e4m3() -> None:
    checks_kv.check_e4m3("cuda")


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("block_size, head_dim", [(16, 64), (64, 128)])
def test_exact(format: str, block_size: int, head_dim: int) -> None:
    checks_kv.check_exact(format, block_size, head_dim, "cuda", impl="triton", order="block")


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("block_size, head_dim", [(16, 64), (64, 128)])
def test_constant(format: str, block_size: int, head_dim: int) -> None:
    checks_kv.check_constant(format, block_size, head_dim, "cuda", impl="triton", order="block")


def test_e4m3_without_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs that cannot convert e4m3: shifts, the same numbers."""
    for module in (codec_triton, decode_triton, kv_cache_triton):
        monkeypatch.setattr(module, "reading", lambda codec: "fp8_shifted" if codec == "fp8" else codec, raising=False)
    checks_kv.check_exact("fp8", 64, 128, "cuda", impl="triton", order="block")
    checks.check_decode("fp8", [1, 130, 900], 64, 2, 4, 128, "cuda", impl="triton")


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_layers_in_a_graph(format: str, rows: int) -> None:
    """Kernels that start before the one before has ended read what it wrote: the newest token's keys and values, which
    are overwritten before each replay, above all."""
    layers = chain("bf16", rows, 2, format)
    with torch.inference_mode():
        want = layers.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layers.run()
        for _ in range(10):
            got.fill_(float("nan"))
            for _, kv in layers.layers:
                for side in (kv.key, kv.value, kv.key_scale, kv.value_scale):
                    if side is not None:
                        side[layers.slots // BLOCK, layers.slots % BLOCK] = 0x7E7E
            graph.replay()
            assert torch.equal(got, want)


@pytest.mark.parametrize("kv", [*kernels.KV_FORMATS, KVPlan.of({"default": "int4", 0: "bf16", 1: "fp8"})], ids=str)
def test_engine(kv: str | KVPlan) -> None:
    """Decode steps, as CUDA graphs, give tokens the chances that a prompt that holds them gives."""
    prompts = [[5, 6, 7, *range(40)], [9, 10], list(range(100, 170))]
    with Engine(EngineConfig(model="synthetic:tiny", device="cuda", memory_limit=1 << 30, kv=kv)) as engine:
        assert engine.measured_memory()["kv"] == engine.memory.kv
        outputs = engine.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0))
        whole = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
        scored = engine.generate(whole, SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=True))
        for output, score in zip(outputs, scored, strict=True):
            drawn = torch.tensor([chosen.logprob for chosen in output.logprobs])
            assert torch.allclose(drawn, torch.tensor(score.prompt_logprobs[-6:]), atol=0.08)


def main() -> None:
    """64 sequences of 2048 tokens: each format as configured, then 8-bit ones with other tiles and splits."""
    tiles = {(32, 1, 4), (32, 1, 3), (32, 2, 3), (64, 2, 3)}
    for format in kernels.KV_FORMATS:
        problem = problems.decode(format, 64, 2048)
        default = decode_config(format, 64, 8, 2048)
        others = {DecodeConfig(tile, splits, 128, w, st) for tile, w, st in tiles for splits in (2, 3)}
        for config in [default, *sorted(others - {default}, key=str)] if format in ("fp8", "k8v4") else [default]:
            call = partial(decode_triton.decode_triton, config=config)
            got = call(problem.q, problem.layers[0], problem.tables, problem.lengths, 128**-0.5)
            held = (side.double() for side in kernels.read_kv(problem.layers[0], problem.tables[0], 2048))
            error = checks.relative_error(got[:1], checks.attention64(problem.q[:1], *held, 128**-0.5))
            us = microseconds(problem.calls(call))
            rate = problem.nbytes / us / 1e6
            print(f"{format} 64 x 2048: {us:.1f} us, {rate:.2f} TB/s, error {error:.1e}, {config}", flush=True)


if __name__ == "__main__":
    main()
