"""What a session and a prompt must satisfy before a request stands in line."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from engine.errors import ConfigError, RequestError
from engine.model.spec import ModelSpec


def check_session_len(asked: int | None, longest: int, why: str) -> None:
    """ConfigError where a session is asked to hold more tokens than `longest`; why: "the model has positions for"."""
    if asked is not None and asked > longest:
        raise ConfigError(f"session_len is {asked:,}; {why} {longest:,} tokens, so it must be at most that")


def whole_tokens(prompt: Iterable[int]) -> list[int]:
    """Token ids as ints, also out of an array, whose own numbers are found in no prefix cache. RequestError where they
    are none."""
    if not isinstance(prompt, Iterable):
        raise RequestError(f"the prompt is {prompt!r}; it must be text or token ids")
    tokens = []
    for token in prompt:
        try:
            tokens.append(operator.index(token))
        except TypeError:
            raise RequestError(f"the prompt holds {token!r}; token ids are whole numbers") from None
    return tokens


def check_prompt(tokens: Sequence[int], session_len: int, spec: ModelSpec, tokens_that_fit: int) -> None:
    """RequestError where a prompt is empty, leaves no room for a token, or holds an id outside the vocabulary."""
    if not tokens:
        raise RequestError("the prompt is empty; it must hold at least one token")
    if len(tokens) >= session_len:
        raise RequestError(
            f"the prompt has {len(tokens):,} tokens; model and KV pool leave room for at most {session_len - 1:,} "
            f"(positions: {spec.max_positions:,}, tokens that fit: {tokens_that_fit:,})"
        )
    wrong = [token for token in tokens if not 0 <= token < spec.vocab_size]
    if wrong:
        raise RequestError(f"token id {wrong[0]} is outside the vocabulary; ids are 0 to {spec.vocab_size - 1}")
