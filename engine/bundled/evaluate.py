"""Held-out figures of the bundled model: perplexity, bits per byte, and how often its completions are valid Python."""

import ast
import codeop
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.bundled.corpus import MAX_LENGTH, Tokens

PROMPTS = ("def fibonacci(n):", "class Stack:\n    def __init__(self):", "import os\n\ndef list_files(path):")
COMPLETIONS = 50
NEW_TOKENS = 128
TEMPERATURE = 0.7
HEADER = re.compile(r"^ *def \w+\(.*\):$", re.MULTILINE)


@torch.no_grad()
def negative_log_likelihood(model: LlamaForCausalLM, stream: Tokens, context: int = MAX_LENGTH) -> float:
    """Summed loss in nats of every token of `stream` but the first, in windows of `context` tokens without overlap."""
    total = 0.0
    for first in tqdm(range(0, len(stream) - 1, context), desc="perplexity", unit="window"):
        window = torch.from_numpy(stream[first : first + context + 1].astype(np.int64)).to(model.device)
        logits = cast(Tensor, model(window[None, :-1], use_cache=False).logits)[0]
        total += functional.cross_entropy(logits.float(), window[1:], reduction="sum").item()
    return total


def complete(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Each prompt with its continuation, up to the end of the file or `NEW_TOKENS`; greedy at temperature 0."""
    torch.manual_seed(seed)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    outputs = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **sampling)
    return [cast(str, tokenizer.decode(output, skip_special_tokens=True)) for output in outputs]


def function_of(text: str) -> str:
    """The function that `text` begins with: without what follows at its depth, or without a last, partial line."""
    lines = text.split("\n")
    outside = (i for i, line in enumerate(lines) if i and line.strip() and not line.startswith(" "))
    return "\n".join(lines[: next(outside, len(lines) - 1)])


def parses(text: str) -> bool:
    """Whether `text` is valid Python with a body, after dropping from its end the line and statement left unfinished.

    Only lines that more text could still complete (an open bracket, string or block) are dropped: an error anywhere
    else counts as one.
    """
    lines = text.split("\n")
    flags = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]  # absent from the stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in generated text is the model's affair
        while len(lines) > 1:
            try:
                compile("\n".join(lines) + "\n", "<completion>", "exec", flags)
                return True
            except SyntaxError as error:
                if "incomplete input" not in str(error):
                    return False
            lines.pop()
    return False


def held_out_headers(text: str) -> list[str]:
    """`COMPLETIONS` one-line function headers, spread evenly over the held-out text, without indentation."""
    headers = sorted({textwrap.dedent(header) for header in HEADER.findall(text)}, key=text.index)
    return [headers[i * len(headers) // COMPLETIONS] for i in range(COMPLETIONS)]


def evaluate(model_dir: Path, corpus: Path, device: torch.device) -> dict[str, object]:
    """The model card's figures, over all held-out files: the bf16 weights, in float32 arithmetic.

    The completions continue headers of the held-out excerpt, without what stood before them; they are seeded.
    """
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    with np.load(corpus) as arrays:
        held_out, held_out_bytes = arrays["held_out"], int(arrays["held_out_bytes"])
    headers = held_out_headers((model_dir / "heldout.txt").read_text(encoding="utf-8"))
    completions = [function_of(text) for text in complete(model, tokenizer, headers, TEMPERATURE)]
    nats = negative_log_likelihood(model, held_out)
    return {
        "held_out_tokens": len(held_out),
        "held_out_bytes": held_out_bytes,
        "perplexity": round(math.exp(nats / (len(held_out) - 1)), 4),
        "bits_per_byte": round(nats / math.log(2) / held_out_bytes, 4),
        "completions": len(completions),
        "completions_that_parse": sum(map(parses, completions)),
        "temperature": TEMPERATURE,
        "greedy": complete(model, tokenizer, PROMPTS),
        "sampled": complete(model, tokenizer, PROMPTS, TEMPERATURE),
        "sampled_from_held_out_headers": completions[:10],
    }
