"""What the memory plan counts beside weights and KV: allocations that have a bound of their own, against that bound."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import EngineConfig
from engine.loading.shapes import SHAPES
from engine.model.kv_plan import KeyBias
from engine.model.spec import ModelSpec
from engine.running import sampler
from engine.running.sampler import SamplingPlan, sample, sampling_bytes, sorting_bytes, token_logprobs
from engine.running.workspace import workspace_bytes, workspace_parts
from engine.sampling_params import SamplingParams
from kernels import KV_FORMATS, allocate_kv, most_expanded_bytes
from kernels.paged import kv_cache_triton
from kernels.paged.expansion import EXPAND_BYTES, EXPAND_ROWS, worth_expanding
from tests.unit.engine.support import make_request

CUDA = torch.device("cuda")
MB = 1 << 20


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are alive of those made inside, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@contextmanager
def allocated() -> Iterator[Allocated]:
    with torch.inference_mode(), Allocated() as counted:
        yield counted


# expanded blocks


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("rows", [0, 127, 128, 700])
def test_no_expansion_exceeds_its_bound_and_one_reaches_it(
    monkeypatch: pytest.MonkeyPatch, format: str, rows: int
) -> None:
    monkeypatch.setattr(kv_cache_triton, "expand_kernel", {(7, 2, 2 * n): lambda *_, **__: None for n in range(99)})
    monkeypatch.setattr(kv_cache_triton, "reading", lambda name: name)  # asks the GPU
    layer = allocate_kv(format, 1, 16, 2, 64, "cpu")
    widest, taken = 7, [0]
    for batch in range(1, 9):
        if worth_expanding(rows, batch, widest, layer):
            tables = torch.zeros(batch, widest, dtype=torch.int32)
            dense, addresses = kv_cache_triton.expand_blocks(layer, tables, torch.zeros(batch, dtype=torch.int32))
            taken.append(dense.nbytes + addresses.nbytes)
    assert max(taken) == most_expanded_bytes(format, rows, widest, 16, 2, 64)
    assert (max(taken) > 0) == (format != "bf16" and rows >= EXPAND_ROWS)


def test_an_expansion_ends_where_its_largest_size_does() -> None:
    layer = allocate_kv("int4", 1, 64, 8, 128, "cpu")
    widths = [width for width in range(2000) if worth_expanding(4096, 16, width, layer)]
    reached = 16 * max(widths) * 4 * 64 * 8 * 128
    bound = most_expanded_bytes("int4", 4096, 2000, 64, 8, 128)
    assert reached == EXPAND_BYTES <= bound < 1.001 * EXPAND_BYTES


# sampling

ROWS, VOCAB = 12, 5000
EVERYTHING = {"temperature": 0.8, "top_k": VOCAB - 1, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, EVERYTHING])
def test_sampling_takes_no_more_than_is_planned(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """However many rows there are: what sorts take does not grow with them."""
    monkeypatch.setattr(sampler, "SORTED_ELEMENTS", 2 * VOCAB)
    requests = [make_request(str(i), [1, 2, 3]) for i in range(ROWS)]
    for request in requests:
        request.params = SamplingParams(**options, logprobs=3)
    plan = SamplingPlan.of(requests, VOCAB)
    staged = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    with allocated() as counted:
        logits = torch.randn(ROWS, VOCAB, dtype=dtype)
        tokens, _ = sample(logits, plan, staged)
        token_logprobs(logits, tokens, requests)
    small = 64 * ROWS * 8  # indices and results by row
    assert counted.peak <= sampling_bytes(ROWS, VOCAB, dtype.itemsize) + sorting_bytes(ROWS, VOCAB) + small
    assert sorting_bytes(ROWS, VOCAB) == sorting_bytes(2, VOCAB) == 2 * sorting_bytes(1, VOCAB)


def test_rows_are_sorted_in_parts_with_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [make_request(str(i), [i, 2, 3]) for i in range(ROWS)]
    for i, request in enumerate(requests):
        request.params = SamplingParams(temperature=0.5 + 0.1 * i, top_k=(0, 7, 3)[i % 3], top_p=1 - 0.05 * i)
    plan = SamplingPlan.of(requests, VOCAB)
    staged = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    whole = sample(logits, plan, staged)[0]
    for elements in (1, VOCAB, 5 * VOCAB):
        monkeypatch.setattr(sampler, "SORTED_ELEMENTS", elements)
        assert torch.equal(sample(logits, plan, staged)[0], whole)


# the plan


def parts(spec: ModelSpec = SHAPES["7b"], **options: Any) -> dict[str, int]:
    return workspace_parts(spec, EngineConfig(model="synthetic:7b", **options), 2, CUDA)


def test_a_quantized_cache_counts_what_prefill_expands() -> None:
    sorting = sorting_bytes(64, SHAPES["7b"].vocab_size)
    assert parts(kv="bf16")["transient"] == sorting < 150 * MB
    for kv in ("int8", "int4", "fp8", "k8v4", {"default": "bf16", "layers.3": "int8"}):
        assert EXPAND_BYTES <= parts(kv=kv)["transient"] < 1.001 * EXPAND_BYTES
    short = parts(kv="int8", session_len=1024)["transient"]  # 16 sequences of 16 blocks of 64 tokens
    assert short == max(most_expanded_bytes("int8", 2048, 16, 64, 8, 128), sorting)
    assert parts(kv="int8", session_len=1024, max_batched_tokens=4096)["transient"] > short
    assert parts(kv="int8", impl="torch")["transient"] == sorting, "the reference expands nothing"


def test_a_checkpoint_with_a_repaired_layer_counts_it_too() -> None:
    """Formats are those that layers have, not the one that was asked for."""
    spec = replace(SHAPES["7b"], key_biases=(KeyBias(400.0, 100.0),) * SHAPES["7b"].num_layers)
    assert set(spec.kv_formats("int4", True)) == {"bf16"}
    assert parts(spec, kv="int4")["transient"] < EXPAND_BYTES <= parts(spec, kv="int4", kv_repair=False)["transient"]


def test_graphs_count_as_many_rows_as_they_are_captured_for() -> None:
    """512 tokens of a prompt, and the padded batch with its logits, which are kept in a second place."""
    few, many = parts(max_batch_size=64)["graphs"], parts(max_batch_size=4096, max_batched_tokens=4096)["graphs"]
    per_row = (many - few) / (4096 - 64)
    assert per_row == 2 * (4 * 4096 + 2 * 6144 + 3 * 14336) + 2 * 2 * 92544
    assert few == 64 * per_row + 512 * 2 * (4 * 4096 + 2 * 6144 + 3 * 14336)
    assert parts(graphs=False)["graphs"] == 0


def test_the_plan_holds_the_sum_on_a_gpu_and_only_the_step_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model="synthetic:7b", kv="int8", device="cpu")
    spec = SHAPES["7b"]
    step = workspace_parts(spec, config, 2, torch.device("cpu"))
    assert step.keys() == {"activations", "logits"} and workspace_bytes(spec, config, 2) == sum(step.values())
    monkeypatch.setattr("engine.running.workspace.resolve_device", lambda name: CUDA)
    assert workspace_bytes(spec, config, 2) == sum(parts(kv="int8").values()) > sum(step.values()) + EXPAND_BYTES
