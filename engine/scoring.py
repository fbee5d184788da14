"""The model's logits after every token of texts that are known: what quality is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from engine.errors import ConfigError, RequestError
from engine.request import Request
from engine.running.torch_runner import TorchRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledRequest

if TYPE_CHECKING:
    from engine.engine import Engine

CHUNK = 128


def prompt_logits(
    engine: Engine, prompts: Sequence[Sequence[int]], *, chunk: int = CHUNK
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (prompt, start, logits): logits [R, vocab] after the tokens start to start + R - 1 of that prompt.

    Prompts are computed `chunk` tokens at a time, several side by side, and each chunk attends to the keys and values
    of those before it as the pool holds them: KV format, weight format and kernels all count. At most `chunk` rows of
    logits are alive at once. A prompt's chunks come in order; those of different prompts are interleaved.

    The pool's blocks are overwritten: RequestError where the engine has unfinished requests, and what the prefix cache
    held is forgotten. RequestError for a prompt that is empty or too long, ConfigError where nothing is computed.
    """
    runner = engine.runner
    if not isinstance(runner, TorchRunner):
        raise ConfigError(f"runner is {engine.config.runner!r}; logits need the runner 'torch'")
    if engine.has_unfinished():
        raise RequestError("the engine has unfinished requests; logits are read from an engine that is idle")
    longest = min(engine.session_len, engine.memory.tokens_that_fit)
    for prompt in prompts:
        if not 0 < len(prompt) <= longest:
            raise RequestError(f"a prompt has {len(prompt):,} tokens; it must have 1 to {longest:,}")
    engine.reset_prefix_cache()
    blocks = -(-max(map(len, prompts), default=1) // engine.block_size)
    side_by_side = max(1, min(engine.config.max_batched_tokens // chunk, engine.memory.num_blocks // blocks))
    for first in range(0, len(prompts), side_by_side):
        group = [
            _request(list(prompt), range(i * blocks, (i + 1) * blocks))
            for i, prompt in enumerate(prompts[first : first + side_by_side])
        ]
        for start in range(0, max(request.num_prompt for request in group), chunk):
            open_ones = [i for i, request in enumerate(group) if request.num_prompt > start]
            items = [ScheduledRequest(group[i], start, min(chunk, group[i].num_prompt - start)) for i in open_ones]
            for i, logits in zip(open_ones, runner.prompt_logits(items), strict=True):
                yield first + i, start, logits


def _request(tokens: list[int], blocks: range) -> Request:
    return Request("scored", tokens, SamplingParams(), 0.0, 0.0, block_ids=list(blocks))
