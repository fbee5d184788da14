"""The runner on a CPU, driven by hand-made batches: arrays, tokens, log-probabilities, memory, and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, NonFiniteLogitsError
from engine.loading.loader import LoadedModel, load_model
from engine.request import Request
from engine.running.step_arrays import Staging, step_arrays
from engine.running.torch_runner import TorchRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, ScheduledRequest, StepResult
from tests.unit.engine.checkpoints import logits_by_transformers, random_model, save, tiny_config

MEGABYTE = 1 << 20
BLOCK = 16


def config(model: str = "synthetic:tiny", **options: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"device": "cpu", "impl": "torch", "memory_limit": 64 * MEGABYTE}
    return EngineConfig(model=model, **{**defaults, **options})


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load_model(config()) as model:
        yield model


@pytest.fixture
def runner(model: LoadedModel) -> Iterator[TorchRunner]:
    runner = TorchRunner(config(), model)
    yield runner
    runner.close()


def make_request(name: str, ids: Sequence[int], blocks: Sequence[int], **params: Any) -> Request:
    return Request(name, list(ids), SamplingParams(**params), 0.0, 0.0, block_ids=list(blocks))


def prefill(*items: tuple[Request, int, int]) -> ScheduledBatch:
    return ScheduledBatch(prefills=[ScheduledRequest(*item) for item in items])


def decode(*requests: Request) -> ScheduledBatch:
    return ScheduledBatch(decodes=[ScheduledRequest(r, r.num_tokens - 1, 1) for r in requests])


def answer(runner: TorchRunner, request: Request, count: int) -> list[int]:
    """Greedy or sampled tokens of one request alone."""
    batch = prefill((request, 0, request.num_tokens))
    for _ in range(count):
        token = runner.execute(batch).token_ids[0]
        assert token is not None
        request.output_token_ids.append(token)
        batch = decode(request)
    return request.output_token_ids


# --- a batch as arrays ----------------------------------------------------------------------------------------------


def test_arrays_of_a_mixed_batch() -> None:
    old = make_request("old", [10, 11, 12, 13, 14], [7, 3])
    old.output_token_ids += [20]
    chunk = make_request("chunk", range(100, 140), [5, 1, 9])
    fresh = make_request("fresh", [30, 31], [2])
    items = [ScheduledRequest(old, 5, 1), ScheduledRequest(chunk, 15, 4), ScheduledRequest(fresh, 0, 2)]
    arrays = step_arrays(items, 1, BLOCK)
    assert arrays["tokens"].tolist() == [20, 115, 116, 117, 118, 30, 31]
    assert arrays["positions"].tolist() == [5, 15, 16, 17, 18, 0, 1]
    assert arrays["lengths"].tolist() == [6, 19, 2]
    assert arrays["query_starts"].tolist() == [0, 4, 6]
    assert arrays["rows"].tolist() == [0, 6]  # the chunk does not reach its prompt's end


def test_slots_follow_the_block_table() -> None:
    one = make_request("a", range(40), [5, 1, 9])
    arrays = step_arrays([ScheduledRequest(one, 14, 20)], 0, BLOCK)
    wanted = [5 * 16 + 14, 5 * 16 + 15, *range(16, 32), 9 * 16, 9 * 16 + 1]
    assert arrays["slots"].tolist() == wanted
    assert arrays["block_tables"].tolist() == [[5, 1, 9]]
    assert arrays["block_tables"].dtype == arrays["lengths"].dtype == arrays["query_starts"].dtype == np.int32
    assert arrays["slots"].dtype == arrays["tokens"].dtype == arrays["rows"].dtype == np.int64


def test_decodes_only() -> None:
    requests = [make_request(str(i), range(i + 1), [i + 1]) for i in range(3)]
    arrays = step_arrays([ScheduledRequest(r, r.num_tokens - 1, 1) for r in requests], 3, BLOCK)
    assert arrays["query_starts"].tolist() == [0]
    assert arrays["positions"].tolist() == [0, 1, 2] and arrays["slots"].tolist() == [16, 33, 50]


def test_one_copy_keeps_every_dtype_and_shape() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.integers(0, 1 << 40, 5),
        "b": rng.integers(0, 100, (3, 7)).astype(np.int32),
        "empty": np.empty(0, np.int64),
        "c": rng.random(9).astype(np.float32),
        "d": rng.random(1),
    }
    staging = Staging(torch.device("cpu"))
    for _ in range(2):
        copied = staging.copy(arrays)
        assert all(np.array_equal(copied[name].numpy(), array) for name, array in arrays.items())
        assert all(copied[name].numpy().dtype == array.dtype for name, array in arrays.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in copied.values()}) == 1


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = random_model(tiny_config("llama"))
    save(theirs, tmp_path)
    ids = list(range(30, 50))
    with load_model(config(str(tmp_path))) as model:
        runner = TorchRunner(config(str(tmp_path)), model)
        ours = answer(runner, make_request("a", ids, [3, 1, 2]), 12)
        runner.close()
    for _ in range(12):
        ids.append(int(logits_by_transformers(theirs, ids)[-1].argmax()))
    assert ours == ids[20:]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_request_gets_the_same_tokens_in_company(runner: TorchRunner, params: dict[str, Any]) -> None:
    alone = answer(runner, make_request("a", range(20, 41), [3, 1, 2], **params), 6)
    one = make_request("a", range(20, 41), [3, 1, 2], **params)
    other = make_request("b", range(90, 130), [4, 5, 6], temperature=1.5)
    late = make_request("c", range(60, 69), [7])
    first = runner.execute(prefill((other, 0, 32), (one, 0, 21))).token_ids
    assert first[0] is None and first[1] is not None
    one.output_token_ids.append(first[1])
    batch = ScheduledBatch(decode(one).decodes, prefill((other, 32, 8), (late, 0, 9)).prefills)
    while one.num_output < 6:
        items = [item.request for item in batch.items]
        again = [*runner.execute(batch).token_ids]
        assert again == [*runner.execute(batch).token_ids]  # a step may be repeated after an interrupt
        for request, token in zip(items, again, strict=True):
            assert token is not None
            request.output_token_ids.append(token)
        batch = decode(*items)
    assert one.output_token_ids == alone


def test_logprobs_only_where_asked(runner: TorchRunner) -> None:
    asks = make_request("a", range(5), [1], logprobs=3)
    plain = make_request("b", range(9), [2])
    chunk = make_request("c", range(30), [3, 4], logprobs=1)
    result = runner.execute(prefill((plain, 0, 9), (chunk, 0, 20), (asks, 0, 5)))
    assert result.logprobs is not None and result.logprobs[:2] == [None, None]
    told = result.logprobs[2]
    assert told is not None and told.token_id == result.token_ids[2] == told.top[0][0] and len(told.top) == 3
    assert runner.execute(prefill((plain, 0, 9))).logprobs is None


@pytest.mark.parametrize("sizes", [(40,), (16, 24), (1, 38, 1), (39, 1)])
def test_prompt_logprobs_in_chunks(tmp_path: Path, sizes: Sequence[int]) -> None:
    theirs = random_model(tiny_config("qwen2"))
    save(theirs, tmp_path)
    ids = list(range(100, 140))
    logits = logits_by_transformers(theirs, ids).double().log_softmax(-1)
    expected = [float(logits[t, ids[t + 1]]) for t in range(39)]
    with load_model(config(str(tmp_path))) as model:
        runner = TorchRunner(config(str(tmp_path)), model)
        scored, other = (
            make_request("a", ids, [4, 2, 3], prompt_logprobs=True),
            make_request("b", range(9, 60), [5, 6, 7, 8]),
        )
        found: list[float] = []
        start = 0
        for size in sizes:
            result = runner.execute(prefill((other, start, 2), (scored, start, size)))
            assert result.prompt_logprobs is None or result.prompt_logprobs[0] is None
            found += (result.prompt_logprobs and result.prompt_logprobs[1]) or []
            start += size
        assert result.token_ids[1] is not None
        scored.output_token_ids.append(result.token_ids[1])
        assert runner.execute(decode(scored)).prompt_logprobs is None
        runner.close()
    assert found == pytest.approx(expected, abs=2e-3)


def test_nan_names_the_request_and_spares_the_others(model: LoadedModel, runner: TorchRunner) -> None:
    good, bad = make_request("good", range(20, 40), [1, 2]), make_request("bad", [7, 500, 9], [3])
    right = runner.execute(prefill((good, 0, 20))).token_ids
    table = model.decoder(weights="bf16", group_size=128, device=torch.device("cpu"), impl="torch").embeddings
    assert table is not None
    kept = table[500].clone()
    with torch.inference_mode():
        table[500] = float("nan")
    try:
        with pytest.raises(NonFiniteLogitsError, match="request bad are not finite") as caught:
            runner.execute(prefill((good, 0, 20), (bad, 0, 3)))
        assert caught.value.request_ids == ("bad",)
        assert runner.execute(prefill((good, 0, 20))).token_ids == right
    finally:
        with torch.inference_mode():
            table[500] = kept
    reused = make_request("reused", range(20, 40), [3, 2])  # a block that holds NaN is somebody else's now
    assert runner.execute(prefill((reused, 0, 20))).token_ids == right


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_what_is_held_is_what_was_planned(kv: str, impl: str) -> None:
    options = config(kv=kv, impl=impl, weights="int8")
    with load_model(options) as model:
        runner = TorchRunner(options, model)
        measured = runner.measured_memory()
        assert measured["kv"] == runner.memory.kv
        assert measured["weights"] == runner.memory.weights_total
        assert runner.memory.limit == 64 * MEGABYTE and runner.memory.free >= 0
        runner.close()
        assert runner.measured_memory() == {}
        runner.close()
        with pytest.raises(RuntimeError, match="closed"):
            runner.execute(prefill((make_request("a", [1], [0]), 0, 1)))


def test_quantized_cache_keeps_the_bytes_and_raises_the_tokens(model: LoadedModel) -> None:
    plans = {}
    for kv in ("bf16", "int8", "int4"):
        runner = TorchRunner(config(kv=kv), model)
        plans[kv] = runner.memory
        runner.close()
    assert plans["int4"].tokens_that_fit > 3.4 * plans["bf16"].tokens_that_fit
    assert plans["int8"].tokens_that_fit > 1.8 * plans["bf16"].tokens_that_fit
    assert plans["int4"].kv == pytest.approx(plans["bf16"].kv, rel=0.01)


def test_the_default_limit_is_modest_on_a_cpu(model: LoadedModel) -> None:
    runner = TorchRunner(config(memory_limit=None, cache_ratio=0.01), model)
    plan = runner.memory
    assert plan.limit - plan.weights_total - plan.workspace <= 1 << 30
    runner.close()


def test_a_limit_that_holds_no_cache_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"memory_limit is 1.1 MB.*at least [\d,.]+ MB are needed"):
        TorchRunner(config(memory_limit=MEGABYTE), model)


def test_opening_and_closing_leaves_no_memory_behind(tmp_path: Path) -> None:
    save(random_model(tiny_config("llama"), torch.bfloat16), tmp_path)
    process = psutil.Process()
    options = config(str(tmp_path), impl="auto", memory_limit=24 * MEGABYTE, weights="int8")

    def cycle() -> None:
        with load_model(options) as model:
            runner = TorchRunner(options, model)
            answer(runner, make_request("a", range(30), [0, 1, 2]), 3)
            runner.close()

    for _ in range(5):  # allocators and caches settle
        cycle()
    gc.collect()
    before = process.memory_info().rss, process.num_fds()
    for _ in range(50):
        cycle()
    gc.collect()
    assert process.memory_info().rss - before[0] < 32 * MEGABYTE  # the C allocator may keep a pool or two, not fifty
    assert process.num_fds() == before[1]


# --- what it says, and what it refuses ------------------------------------------------------------------------------


def test_description_says_where_the_fast_path_is_not_taken(model: LoadedModel) -> None:
    slow, fast = TorchRunner(config(), model), TorchRunner(config(impl="auto", weights="int4", kv="int8"), model)
    assert "reference path, not the fast one" in slow.description
    assert "impl aten in bfloat16" in fast.description and "int4 group 128" in fast.description
    assert "KV int8" in fast.description and "block 16" in fast.description
    for runner in (slow, fast):
        runner.close()


def test_implementations_that_do_not_fit_the_device(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"'triton'.*'cuda'"):
        TorchRunner(config(impl="triton"), model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        TorchRunner(config(device="cuda", impl="auto"), model)


def test_step_result_of_chunks_alone(runner: TorchRunner) -> None:
    one = make_request("a", range(40), [1, 2, 3])
    result = runner.execute(prefill((one, 0, 17)))
    assert isinstance(result, StepResult) and [*result.token_ids] == [None] and result.device_seconds is None
