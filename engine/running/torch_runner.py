"""The runner that computes, on a CPU or a GPU: decoder, KV pool, sampler, and one copy to the device per step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.clock import Clock, MonotonicClock
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.loading.loader import LoadedModel
from engine.model.decoder import Decoder
from engine.model.rope import cos_sin_table
from engine.model.spec import ModelSpec
from engine.model.step_inputs import StepInputs
from engine.model.weight_plan import WeightPlan
from engine.request import TokenLogprobs
from engine.running.device import check_impl, device_label, impl_label, resolve_device
from engine.running.graphs import DecodeGraphs, padded_size
from engine.running.memory import MemoryPlan, plan_memory
from engine.running.preparation import Preparation, PreparedStep
from engine.running.prompt_graphs import MOST_TOKENS, PromptGraphs
from engine.running.readback import Readback
from engine.running.sampler import SamplingPlan, known_logprobs, sample, token_logprobs
from engine.running.step_arrays import Arrays, Staging, inert_prompts, step_arrays
from engine.running.torch_step import Scored, TorchStep, add_scored, by_item, scored_items
from engine.running.workspace import (
    CPU_BLOCK_SIZE,
    CUDA_BLOCK_SIZE,
    PROMPT_ROWS,
    default_limit,
    prompt_tokens,
    workspace_bytes,
)
from engine.scheduling.batch import ScheduledBatch, ScheduledRequest, StepResult
from kernels import KVLayer, allocate_kv
from kernels.tuning import TUNED_ROWS


class TorchRunner:
    """See `engine.running.runner.Runner`. Borrows the decoder from `model`; owns the KV pool and the rotary table."""

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        """ConfigError where the device is missing, the memory does not suffice, or a format does not fit the model."""
        self.device = resolve_device(config.device)
        check_impl(config.impl, self.device)
        self.config = config
        self._spec = model.spec
        self._clock = MonotonicClock()
        self._host_bytes = model.host_bytes
        with torch.inference_mode():
            decoder = model.decoder(
                weights=config.weights, group_size=config.group_size, device=self.device, impl=config.impl
            )
            self._weights = _weights_label(config, self._spec, decoder)
            self._impl = impl_label(config.impl, self.device, decoder.matrices().values())
            self._memory = self._plan(decoder)
            length = min(config.session_len or self._spec.max_positions, self._memory.tokens_that_fit)
            self._cos_sin: Tensor | None = cos_sin_table(self._spec, length, self.device)
            self._kv = self._allocate()
        self._decoder: Decoder | None = decoder
        self.asynchronous = self.device.type == "cuda"
        self._staging = Staging(self.device)
        self._readback = Readback(padded_size(config.max_batch_size), decoder.dtype, self.device, config.impl)
        self._prepare = self._preparation()
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        if config.graphs and self.device.type == "cuda" and config.impl != "torch":
            longest = -(-length // self._memory.block_size)
            held = decoder, self._kv, self._cos_sin, self._readback
            self._graphs = DecodeGraphs(*held, longest)
            self._prompt_graphs = PromptGraphs(*held, self._memory.block_size)
        self._baseline = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _plan(self, decoder: Decoder) -> MemoryPlan:
        config, spec = self.config, self._spec
        weights = decoder.weight_bytes()
        workspace = workspace_bytes(spec, config, decoder.dtype.itemsize)
        return plan_memory(
            limit=config.memory_limit or default_limit(self.device, sum(weights.values()), workspace),
            weights=weights,
            workspace=workspace,
            cache_ratio=config.cache_ratio,
            block_bytes=self._block_size * spec.kv_bytes_per_token(config.kv, config.kv_repair),
            block_size=self._block_size,
        )

    @property
    def _block_size(self) -> int:
        return self.config.block_size or (CUDA_BLOCK_SIZE if self.device.type == "cuda" else CPU_BLOCK_SIZE)

    def _preparation(self) -> Preparation:
        return Preparation(self._memory.block_size, self._spec.vocab_size, len(self._readback.ids))

    def _allocate(self) -> list[KVLayer]:
        spec, plan = self._spec, self._memory
        shape = (plan.num_blocks, plan.block_size, spec.num_kv_heads, spec.head_dim)
        try:
            formats = spec.kv_formats(self.config.kv, self.config.kv_repair)
            return [allocate_kv(name, *shape, self.device) for name in formats]
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the KV pool of {plan.kv:,} bytes does not fit on {self.device} beside what other programs hold "
                "there; lower cache_ratio or memory_limit"
            ) from error

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def clock(self) -> Clock:
        return self._clock

    @property
    def memory(self) -> MemoryPlan:
        return self._memory

    @property
    def description(self) -> str:
        config = self.config
        return (
            f"{device_label(self.device, config.device)}, {self._impl}; "
            f"weights {self._weights}, KV {self._spec.kv_label(config.kv, config.kv_repair)}, "
            f"block {self._memory.block_size}{self._replay}"
        )

    @property
    def _replay(self) -> str:
        if self.device.type != "cuda":
            return ""
        if self._graphs is None:
            return "; no CUDA graphs, every step eager"
        return f"; decode steps are CUDA graphs, and single prompts up to {MOST_TOKENS} tokens once warmed up"

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> TorchStep:
        """See `engine.running.runner.Runner`. On a CPU, or where requests need values, the step is done on return."""
        if self._decoder is None:
            raise RuntimeError("the runner is closed")
        begun = time.perf_counter()
        step = self._prepare(batch)
        plan, sampled = step.plan, step.sampled
        scored = scored_items(batch.items) if batch.prefills else []
        prepared = time.perf_counter()
        slot = self._readback.take()
        slot.begin()
        logits: Tensor | None
        known: list[float] = []
        graphs = None if scored else self._replays(step)
        if graphs is not None:
            logits = self._replayed(graphs, step.arrays, plan)
        else:
            logits, known = self._eager(step, scored)
        slot.fetch(self._readback.buffer)
        chances: list[TokenLogprobs | None] = []
        if plan.logprobs and logits is not None:
            chances = token_logprobs(logits, self._readback.ids[: len(sampled)], sampled)
        prompts = by_item(scored, known, len(batch.items)) if scored else None
        host = (time.perf_counter() if self.asynchronous else prepared) - begun
        return TorchStep(slot, sampled, step.samples, chances, prompts, host)

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """One step, waited for."""
        return self.launch(batch).result()

    @torch.inference_mode()
    def warm_up(self, num_tokens: int, logits: Collection[bool]) -> None:
        """On a CPU nothing is compiled ahead."""
        assert self._cos_sin is not None
        most = min(num_tokens, len(self._cos_sin))  # a session holds no more
        if self.device.type == "cuda":
            for count, length in self._prompt_shapes():
                self._compute_inert(count, length)
        if self._graphs is not None:
            self._graphs.warm_up(self.config.max_batch_size, -(-most // self._memory.block_size), logits)
        if self._prompt_graphs is not None:
            self._prompt_graphs.warm_up(min(most, prompt_tokens(self._spec, self.config)))

    def _prompt_shapes(self) -> list[tuple[int, int]]:
        """(prompts, tokens of each) of steps whose kernels differ: by the number of prompts, and of tokens in all."""
        assert self._cos_sin is not None
        longest, budget, batch = len(self._cos_sin), self.config.max_batched_tokens, self.config.max_batch_size
        most = min(batch, max(1, budget // 256))  # in one step, mostly
        counts = [(1 << i, 1) for i in range(most.bit_length())]
        limit = min(budget + batch, batch * longest)  # short sessions fill a step together
        sizes = {1 << i for i in range(4, limit.bit_length())} | {n for n in TUNED_ROWS if 16 < n < limit} | {limit}
        return counts + [(count, size // count) for size in sorted(sizes) for count in [-(-size // longest)]]

    def _compute_inert(self, count: int, length: int) -> None:
        """A step of prompts that writes no keys and whose logits nobody reads."""
        assert self._decoder is not None and self._cos_sin is not None
        staged = self._staging(inert_prompts(count, length, self._memory.block_size))
        step = StepInputs(**{name: staged[name] for name in _STEP_FIELDS}, num_decodes=0)
        self._decoder.logits(self._decoder(step, self._kv, self._cos_sin))

    def _replays(self, step: PreparedStep) -> DecodeGraphs | PromptGraphs | None:
        """Who computes this step as a graph, if anybody does."""
        if step.num_decodes == len(step.arrays["lengths"]):
            return self._graphs
        if self._prompt_graphs is not None and not step.num_decodes and self._prompt_graphs.fits(step.arrays):
            return self._prompt_graphs
        return None

    def _replayed(self, graphs: DecodeGraphs | PromptGraphs, arrays: Arrays, plan: SamplingPlan) -> Tensor | None:
        """A step as a graph, which chooses greedily; the logits where somebody needs them."""
        penalized = "penalized" in plan.arrays
        extra = {} if penalized else plan.arrays
        logits, staged = graphs(arrays, extra, logits=bool(plan.arrays) or plan.logprobs)
        if plan.arrays and logits is not None:
            staged = self._staging(plan.arrays) if penalized else staged
            self._readback.store(*sample(logits, plan, staged, impl=self.config.impl))
        return logits

    def _eager(self, prepared: PreparedStep, scored: Sequence[Scored]) -> tuple[Tensor, list[float]]:
        """Any step, operation by operation: logits of the rows that sample, and what `scored` asks for."""
        assert self._decoder is not None and self._cos_sin is not None
        arrays, plan, count = prepared.arrays, prepared.plan, len(prepared.sampled)
        if scored:
            add_scored(arrays, scored)
        staged = self._staging({**arrays, **plan.arrays})
        if "feed" in staged:
            staged["tokens"] = self._readback.feed(staged["tokens"], staged["feed"])
        step = StepInputs(**{name: staged[name] for name in _STEP_FIELDS}, num_decodes=prepared.num_decodes)
        hidden = self._decoder(step, self._kv, self._cos_sin)
        known = self._score(hidden[count:], staged["targets"]) if scored else []
        logits = self._decoder.logits(hidden[:count])
        if count:
            self._readback.store(*sample(logits, plan, staged, impl=self.config.impl))
        return logits, known

    def _score(self, hidden: Tensor, targets: Tensor) -> list[float]:
        """Log-probabilities of `targets` after each hidden state, a bounded number of rows at a time."""
        decoder = self._decoder
        assert decoder is not None
        parts = zip(hidden.split(PROMPT_ROWS), targets.split(PROMPT_ROWS), strict=True)
        values: list[float] = torch.cat([known_logprobs(decoder.logits(h), t) for h, t in parts]).tolist()
        return values

    @torch.inference_mode()
    def prompt_logits(self, items: Sequence[ScheduledRequest]) -> Iterator[Tensor]:
        """Compute these prompt chunks in one step; yields the logits [num_new, vocab] after the tokens of each."""
        if self._decoder is None or self._cos_sin is None:
            raise RuntimeError("the runner is closed")
        arrays = step_arrays(items, 0, self._memory.block_size)
        arrays["rows"] = np.arange(sum(item.num_new for item in items))
        staged = self._staging(arrays)
        step = StepInputs(**{name: staged[name] for name in _STEP_FIELDS}, num_decodes=0)
        for hidden in self._decoder(step, self._kv, self._cos_sin).split([item.num_new for item in items]):
            yield self._decoder.logits(hidden)

    def measured_memory(self) -> dict[str, int]:
        """Bytes of the tensors alive; "workspace" is the CUDA allocator's peak beyond them since the start.

        "workspace.graphs" is the part of it that captured graphs keep. "host_copy" is the checkpoint kept in host
        memory, from which another weight format can be built. On a CPU nobody counts the workspace, so it is left out.
        """
        if self._decoder is None:
            return {}
        parts = {f"weights.{name}": size for name, size in self._decoder.weight_bytes().items()}
        parts = {"weights": sum(parts.values()), "kv": sum(layer.nbytes for layer in self._kv), **parts}
        if self.device.type == "cuda":
            parts["workspace"] = max(torch.cuda.max_memory_allocated(self.device) - self._baseline, 0)
        if self._graphs is not None:
            prompts = 0 if self._prompt_graphs is None else self._prompt_graphs.nbytes
            parts["workspace.graphs"] = self._graphs.nbytes + prompts
        if self._host_bytes:
            parts["host_copy"] = self._host_bytes
        return parts

    def close(self) -> None:
        if self._decoder is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step nobody waits for may still run on what is given back
        self._decoder = self._cos_sin = self._graphs = self._prompt_graphs = None
        self._kv = []
        self._staging, self._prepare = Staging(self.device), self._preparation()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


_STEP_FIELDS = ("tokens", "positions", "slots", "block_tables", "lengths", "query_starts", "rows")


def _weights_label(config: EngineConfig, spec: ModelSpec, decoder: Decoder) -> str:
    """The weight format in use; of a checkpoint quantized elsewhere, what was found and what was changed in reading."""
    if spec.stored is None:
        return WeightPlan.of(config.weights).label(config.group_size)
    found = " and ".join(f"{count} matrices {name}" for name, count in decoder.matrix_formats().items())
    notes = "; ".join(note for note in (spec.stored.note, *decoder.notes) if note)
    return f"as in the {spec.stored.method} checkpoint: {found}, lm_head bf16{f' ({notes})' if notes else ''}"
