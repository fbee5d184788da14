"""Tokens to text, a few at a time, and the search for stop strings in what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Text of a growing list of tokens.

    A byte-level token may end inside a character, and some decoders add or drop a space by what stands before. So each
    call decodes a short window twice, with and without the newest tokens, and keeps the difference; text that ends in
    an incomplete character waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._settled = ""
        self._window = 0
        self._read = 0
        self.stopped = False

    def update(self, token_ids: Sequence[int]) -> str:
        """Text of all of `token_ids`; pass the same growing list each time. Stops growing at a stop string."""
        if self.stopped or self._read == len(token_ids):
            return self._settled
        before = self._tokenizer.decode(token_ids[self._window : self._read])
        after = self._tokenizer.decode(token_ids[self._window :])
        incomplete = after.endswith(REPLACEMENT)
        new = after[len(before) :].rstrip(REPLACEMENT) if incomplete else after[len(before) :]
        searched = max(0, len(self._settled) - max(map(len, self._stop), default=1) + 1)
        text = self._settled + new
        hits = [at for stop in self._stop if (at := text.find(stop, searched)) >= 0]
        if hits:
            self._settled = text[: min(hits)]
            self.stopped = True
        elif incomplete:
            return text
        else:
            self._settled = text
            self._window, self._read = self._read, len(token_ids)
        return self._settled
