"""Text for the bundled model: CPython's standard library, split by path, tokenized, packed into batches.

The split depends on a file's path alone, so it is the same on every machine and survives changes inside a file.
"""

import hashlib
import json
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from engine.bundled import END_OF_TEXT

VOCAB_SIZE = 4096
MAX_LENGTH = 2048
HELD_OUT_PERCENT = 4
EXCERPT_BYTES = 200_000
EXCERPT_FILE_BYTES = (1_000, 40_000)

# Not code that people write: codecs (generated tables and near copies of each other), the manual as string literals,
# build settings of one machine, Python 2.
SKIPPED_PREFIXES = ("site-packages/", "encodings/", "pydoc_data/", "_sysconfigdata", "lib2to3/tests/data/")

# A newline is always a token of its own, and indentation always starts a token: so a prompt may end before the newline,
# after it, or after the indentation, and the model has seen all three.
PRE_TOKENS = "|".join(
    [
        r"\n",
        r"(?<![^\n])[^\S\n]+",  # indentation, whole
        r"[^\s\p{L}\p{N}]?\p{L}+",  # a word with the sign before it: .append, _name, (self
        r" \p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",
        r"[^\S\n]+(?!\S)",
        r"\s",
    ]
)

Tokens = NDArray[np.uint16]


def is_held_out(path: str) -> bool:
    """Whether the file at `path` (POSIX, relative to the standard library's folder) stays out of training."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def stdlib_files(root: Path | None = None) -> dict[str, str]:
    """Path to text of each source file worth training on, in the order of paths, without exact duplicates.

    A text that stands on both sides of the split is kept on the held-out side.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(paths, key=lambda path: not is_held_out(path)):
        if path.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the library's own test data for other encodings
            continue
        if not is_prose_or_code(text) or text in seen:
            continue
        seen.add(text)
        texts[path] = text
    return {path: texts[path] for path in sorted(texts)}


def is_prose_or_code(text: str) -> bool:
    """Whether a text is more than a table of numbers, and not empty."""
    words = sum(character.isalpha() or character.isspace() or character == "_" for character in text)
    return len(text) >= 100 and words >= 0.65 * len(text)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text round-trips, because all 256 bytes are in the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tqdm(texts, desc="tokenizer", unit="file"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def write_excerpt(held_out: dict[str, str], folder: Path) -> None:
    """Write `heldout.txt`, `manifest.json`, which lists its files, and Python's licence, which goes where they go."""
    by_hash = sorted(held_out, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    parts: list[str] = []
    files: list[dict[str, str | int]] = []
    for path in by_hash:
        size = len(held_out[path].encode())
        if not EXCERPT_FILE_BYTES[0] <= size <= EXCERPT_FILE_BYTES[1]:
            continue
        parts.append(held_out[path] + END_OF_TEXT)
        files.append({"path": path, "bytes": size})
        if sum(len(part.encode()) for part in parts) >= EXCERPT_BYTES:
            break
    (folder / "heldout.txt").write_text("".join(parts), encoding="utf-8", newline="\n")
    manifest = {"source": f"CPython {platform.python_version()} standard library", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", folder / "LICENSE-PSF.txt")


def prepare(model_dir: Path, corpus: Path) -> None:
    """Write tokenizer and held-out excerpt to `model_dir`, and both splits as token arrays to `corpus` (.npz)."""
    files = stdlib_files()
    held_out = {path: text for path, text in files.items() if is_held_out(path)}
    training = {path: text for path, text in files.items() if not is_held_out(path)}
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(list(training.values()))
    tokenizer.save_pretrained(model_dir)
    write_excerpt(held_out, model_dir)
    arrays: dict[str, NDArray[np.generic]] = {"line_ends": np.array(tokenizer.encode("\n" + END_OF_TEXT))}
    for name, split in (("train", training), ("held_out", held_out)):
        documents = [
            np.array(tokenizer.encode(text + END_OF_TEXT, verbose=False), dtype=np.uint16)
            for text in tqdm(split.values(), desc=name, unit="file")
        ]
        arrays[name] = np.concatenate(documents)
        arrays[f"{name}_lengths"] = np.array([len(document) for document in documents], dtype=np.int64)
        arrays[f"{name}_bytes"] = np.array(sum(len(text.encode()) for text in split.values()))
        print(f"{name}: {len(split)} files, {arrays[f'{name}_bytes']:,} bytes, {len(arrays[name]):,} tokens")
    corpus.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(corpus, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options


def batches(
    documents: list[Tokens], line_ends: list[int], aligned: float, rows: int, context: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    """Endless batches [rows, context + 1]; each epoch reorders the files and shifts where windows begin.

    The share `aligned` of the windows begins where a line does, that is after one of the tokens `line_ends`: as prompts
    do. A model that saw only windows cut anywhere takes a `def` that comes first for one whose indentation was cut off.
    """
    generator = np.random.default_rng(seed)
    offsets = np.arange(context + 1)
    while True:
        stream = np.concatenate([documents[i] for i in generator.permutation(len(documents))])
        starts = np.arange(generator.integers(context), len(stream) - context, context)
        generator.shuffle(starts)
        line_starts = np.append(0, np.flatnonzero(np.isin(stream, line_ends)) + 1)
        moved = line_starts[np.searchsorted(line_starts, starts, side="right") - 1]
        starts = np.where(generator.random(len(starts)) < aligned, moved, starts)
        for first in range(0, len(starts) - rows + 1, rows):
            yield stream[starts[first : first + rows, None] + offsets].astype(np.int64)


def windows(stream: Tokens, rows: int, context: int) -> Iterator[NDArray[np.int64]]:
    """The stream once, in order, as batches [rows, context + 1] that overlap by one token, without the remainder."""
    count = (len(stream) - 1) // context
    for first in range(0, count - rows + 1, rows):
        starts = np.arange(first, first + rows) * context
        yield stream[starts[:, None] + np.arange(context + 1)].astype(np.int64)
