"""Host-side stand-ins: requests without a model, and a device that remembers which token lies in which slot."""

from __future__ import annotations

from collections.abc import Sequence

from engine.model.spec import ModelSpec
from engine.request import Request, RequestStatus
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.cache import KVCache
from engine.scheduling.scheduler import Scheduler, SchedulerConfig


def make_request(name: str, tokens: Sequence[int], *, max_tokens: int = 8, arrival: float = 0.0) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        params=SamplingParams(max_tokens=max_tokens),
        scheduled_arrival=arrival,
        arrival=arrival,
        seed=hash(tuple(tokens)) & 0xFFFF,
        max_tokens=max_tokens,
    )


def make_scheduler(
    num_blocks: int = 16, block_size: int = 4, *, prefix_caching: bool = True, **options: object
) -> Scheduler:
    config = SchedulerConfig(**options)  # type: ignore[arg-type]
    return Scheduler(config, KVCache(num_blocks, block_size, prefix_caching=prefix_caching))


class SlotMemory:
    """Executes a batch by writing tokens into slots, and checks that every slot it then reads is right."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}

    def execute(self, batch: ScheduledBatch) -> list[int | None]:
        for item in batch.items:  # a step writes everything before it reads
            tokens = item.request.token_range(0, item.stop)
            for position in range(item.start, item.stop):
                self.slots[self._slot(item.request, position)] = tokens[position]
        for item in batch.items:
            tokens = item.request.token_range(0, item.stop)
            for position in range(item.start):
                assert self.slots[self._slot(item.request, position)] == tokens[position], (
                    f"{item.request.request_id} reads a wrong token at {position}"
                )
        return [next_token(item.request) if item.samples else None for item in batch.items]

    def _slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_ids[position // self.block_size], position % self.block_size


def next_token(request: Request) -> int:
    """A function of the whole sequence, small enough that equal continuations happen."""
    return (request.seed + sum(request.token_range(0, request.num_tokens))) % 3


def run_step(scheduler: Scheduler, memory: SlotMemory, now: float = 0.0) -> ScheduledBatch:
    batch = scheduler.schedule(now)
    if batch:
        tokens = memory.execute(batch)
        scheduler.advance(batch)
        scheduler.complete(batch, tokens, now)
    for item in batch.items:
        if item.request.num_output >= item.request.max_tokens:
            scheduler.finish(item.request, RequestStatus.LENGTH, now)
    return batch


def tiny_spec() -> ModelSpec:
    return ModelSpec(
        name="tiny",
        architecture="LlamaForCausalLM",
        vocab_size=512,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=256,
        max_positions=4096,
    )


class Letters:
    """A tokenizer whose every token is one letter."""

    vocab_size = 512
    eos_token_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 512 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x100 + token) for token in ids)


class StubModel:
    """What Engine needs of a LoadedModel when no weights are computed with."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.tokenizer = Letters()

    def close(self) -> None:
        pass
