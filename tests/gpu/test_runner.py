"""A 7B model on the GPU answers in every weight and KV format as its own dequantized weights do in float32.

    python -m tests.gpu.test_runner --json FILE          the table of errors, without pytest

Both sides hold the same codes, so a format's own error cancels. What is left is arithmetic in bfloat16 and, with a
quantized cache, keys and values that this arithmetic moved across the edge of a code, each by a whole step. So two
errors are taken: `shared`, where the reference reads the cache that the fast path wrote (arithmetic alone), and `own`,
where it writes its own (the writing too). The reference dequantizes one matrix at a time: the check needs little more
memory than the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel, load_model
from engine.machine import describe_machine
from engine.model.decoder import Decoder
from engine.model.rope import cos_sin_table
from engine.model.spec import ModelSpec
from engine.model.step_inputs import StepInputs
from engine.request import Request
from engine.running.step_arrays import Staging, step_arrays
from engine.running.torch_runner import TorchRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, ScheduledRequest
from kernels import KV_FORMATS, WEIGHT_FORMATS, KVLayer, allocate_kv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = "7b"
BLOCK = 64
PROMPTS = (200, 64, 1)  # tokens: a ragged end, a whole block, and the shortest
FEW = (9, 6, 1)  # in all as many as keep 16-bit activations in every format
DECODES = 3

# Relative error of the logits in the 2-norm. bfloat16 rounds to 2 ** -9 = 0.2 %; about ten roundings in each of 32
# layers add up like a random walk to some 2 %. A step of an int4 code is a fifteenth of a head's range, of an int8 code
# a 255th; per layer, about one element in a hundred crosses an edge of int4. A step of fp8 is up to an eighth of the
# element itself. w8a8, fp8 and w4a8 round the activations of PROMPTS: where bfloat16 moves one across the edge of a
# code, both paths err as much as rounding itself does, but differently (on a CPU by 4 % for int8 activations, over
# 4-bit weights as over 8-bit ones, and by 8 % for fp8, at an eighth of the width); the tight check is that of FEW.
SHARED_BOUND = 0.03
OWN_BOUND = {"bf16": 0.04, "int8": 0.06, "int4": 0.35, "fp8": 0.2, "k8v4": 0.3}
ROUNDING = {"w8a8": 0.12, "fp8": 0.25, "w4a8": 0.12}


class Errors(NamedTuple):
    shared: float
    own: float


@torch.inference_mode()
def logit_errors(
    model: LoadedModel, weights: str, kv: str, device: torch.device, prompts: tuple[int, ...] = PROMPTS
) -> Errors:
    """Over all tokens of ragged prompts in one batch, then of decode steps; the tokens fed are fixed."""
    decoder = model.decoder(weights=weights, group_size=128, device=device, impl="auto")
    reference, spec = decoder.reference(), decoder.spec
    blocks = [-(-(count + DECODES) // BLOCK) for count in prompts]
    shape = (sum(blocks) + 1, BLOCK, spec.num_kv_heads, spec.head_dim)
    cache, own_cache = ([allocate_kv(kv, *shape, device) for _ in range(spec.num_layers)] for _ in range(2))
    found, shared, own = [], [], []
    for items, decodes in _steps(_requests(spec, blocks, prompts), prompts):
        step, table = _inputs(spec, items, decodes, device)
        found.append(_logits(decoder, step, cache, table))
        unwritten = replace(step, slots=torch.full_like(step.slots, -1))
        shared.append(_logits(reference, unwritten, cache, table))
        own.append(_logits(reference, step, own_cache, table))
    return Errors(_relative(found, shared), _relative(found, own))


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    left, right = torch.cat(found), torch.cat(expected)
    return float((left - right).norm() / right.norm())


def _steps(requests: list[Request], prompts: tuple[int, ...]) -> Iterator[tuple[list[ScheduledRequest], int]]:
    """(items, number of decodes): the prompts at once, then one token each."""
    yield [ScheduledRequest(r, 0, n) for r, n in zip(requests, prompts, strict=True)], 0
    for done in range(DECODES):
        yield [ScheduledRequest(r, n + done, 1) for r, n in zip(requests, prompts, strict=True)], len(requests)


def _requests(spec: ModelSpec, blocks: list[int], prompts: tuple[int, ...]) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    free = iter(torch.randperm(sum(blocks), generator=generator).add(1).tolist())
    requests = []
    for i, (count, held) in enumerate(zip(prompts, blocks, strict=True)):
        ids = torch.randint(spec.vocab_size, (count + DECODES,), generator=generator).tolist()
        requests.append(Request(str(i), ids, SamplingParams(), 0.0, 0.0, block_ids=[next(free) for _ in range(held)]))
    return requests


def _inputs(
    spec: ModelSpec, items: list[ScheduledRequest], decodes: int, device: torch.device
) -> tuple[StepInputs, Tensor]:
    arrays = step_arrays(items, decodes, BLOCK)
    arrays["rows"] = np.arange(len(arrays["tokens"]))
    step = StepInputs(**Staging(device)(arrays), num_decodes=decodes)
    return step, cos_sin_table(spec, max(PROMPTS) + DECODES, device)


def _logits(decoder: Decoder, step: StepInputs, cache: list[KVLayer], table: Tensor) -> Tensor:
    return decoder.logits(decoder(step, cache, table)).float()


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load_model(EngineConfig(model=f"synthetic:{SHAPE}")) as model:
        yield model


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_logits_against_the_dequantized_reference(model: LoadedModel, weights: str, kv: str) -> None:
    errors = logit_errors(model, weights, kv, torch.device("cuda"))
    assert errors.shared < SHARED_BOUND + ROUNDING.get(weights, 0.0)
    assert errors.own < OWN_BOUND[kv] + ROUNDING.get(weights, 0.0)


@pytest.mark.parametrize("weights", ROUNDING)
def test_logits_with_activations_of_16_bits(model: LoadedModel, weights: str) -> None:
    assert logit_errors(model, weights, "bf16", torch.device("cuda"), FEW).shared < SHARED_BOUND


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_bytes_held_equal_the_plan(model: LoadedModel, weights: str) -> None:
    decoder = model.decoder(weights=weights, group_size=128, device=torch.device("cuda"), impl="auto")
    assert decoder.weight_bytes() == model.spec.weight_bytes(weights, 128)


def test_memory_is_planned_measured_and_given_back() -> None:
    held = []
    for _ in range(10):
        config = EngineConfig(model="synthetic:tiny", device="cuda", memory_limit=1 << 30, weights="int4", kv="int8")
        with Engine(config) as engine:
            engine.generate(
                ["a prompt", "another"], SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, logprobs=2)
            )
            measured = engine.measured_memory()
            assert measured["kv"] == engine.memory.kv and measured["weights"] == engine.memory.weights_total
            assert 0 < measured["workspace"] <= engine.memory.workspace
            assert "triton" in engine.description
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[0], "cuBLAS keeps a workspace once it was used; nothing may come on top of it"


def test_device_time_is_measured_and_steps_repeat() -> None:
    config = EngineConfig(model="synthetic:tiny", device="cuda", memory_limit=1 << 30)
    with load_model(config) as model:
        runner = TorchRunner(config, model)
        prompt = Request("a", list(range(100)), SamplingParams(temperature=1.0), 0.0, 0.0, seed=5, block_ids=[1, 2])
        batch = ScheduledBatch(prefills=[ScheduledRequest(prompt, 0, 100)])
        first, second = runner.execute(batch), runner.execute(batch)
        assert first.token_ids == second.token_ids
        assert first.device_seconds is not None and first.device_seconds > 0.0
        chunk = runner.execute(ScheduledBatch(prefills=[ScheduledRequest(prompt, 0, 50)]))
        assert [*chunk.token_ids] == [None]
        runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.test_runner", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table with machine, versions and command")
    args = parser.parse_args()
    device, rows = torch.device("cuda"), []
    with load_model(EngineConfig(model=f"synthetic:{SHAPE}")) as model:
        for weights in WEIGHT_FORMATS:
            for kv in KV_FORMATS:
                shared, own = logit_errors(model, weights, kv, device)
                rounding = ROUNDING.get(weights, 0.0)
                bounds = {"shared": SHARED_BOUND + rounding, "own": OWN_BOUND[kv] + rounding}
                rows.append({"weights": weights, "kv": kv, "shared": shared, "own": own, "bounds": bounds})
                print(
                    f"{SHAPE}, weights {weights:4}, KV {kv:4}: error {shared:.4f} (bound {bounds['shared']:.2f}), "
                    f"with a cache of its own {own:.4f} (bound {bounds['own']:.2f})",
                    flush=True,
                )
    if args.json:
        report = {"machine": describe_machine(), "model": f"synthetic:{SHAPE}", "seed": 0, "errors": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
