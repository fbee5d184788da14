"""Text to token ids and back, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer(Protocol):
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as token ids, for models whose text means nothing; ids from 256 on show as printable ASCII."""

    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i if i < 256 else 0x21 + i % 94 for i in ids).decode("utf-8", errors="replace")


class PretrainedTokenizer:
    """The tokenizer of a checkpoint folder, through transformers; remote code is never run."""

    def __init__(self, folder: Path, eos_token_ids: tuple[int, ...] = ()) -> None:
        from transformers import AutoTokenizer

        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
        own = self._tokenizer.eos_token_id
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *([] if own is None else [int(own)])}))
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
