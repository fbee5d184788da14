"""Held-out figures of the bundled model: perplexity, bits per byte, and how often its completions are valid Python."""

import ast
import codeop
import math
import re
import textwrap
import warnings
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.bundled import END_OF_TEXT
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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, temperature: float = 0.0, seed: int = 0
) -> str:
    """`prompt` and its continuation, up to the end of the file or `NEW_TOKENS`; greedy at temperature 0."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **sampling)
    return cast(str, tokenizer.decode(output[0])).removesuffix(END_OF_TEXT)


def function_of(text: str) -> str:
    """The function that `text` begins with: what follows at its header's depth or above is cut off."""
    lines = text.split("\n")
    body = [i for i, line in enumerate(lines) if i and line.strip() and not line.startswith(" ")]
    return "\n".join(lines[: body[0]] if body else lines)


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
    """The model card's figures, over all held-out files; the completions are seeded, so a second call agrees."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device).eval()
    with np.load(corpus) as arrays:
        held_out, held_out_bytes = arrays["held_out"], int(arrays["held_out_bytes"])
    nats = negative_log_likelihood(model, held_out)
    excerpt = (model_dir / "heldout.txt").read_text(encoding="utf-8")
    sampled = []
    for seed, header in enumerate(tqdm(held_out_headers(excerpt), desc="completions")):
        text = complete(model, tokenizer, header, TEMPERATURE, seed)
        unfinished = "" if text.endswith("\n") else text.rpartition("\n")[0]
        sampled.append(function_of(unfinished or text))
    return {
        "held_out_tokens": len(held_out),
        "held_out_bytes": held_out_bytes,
        "perplexity": round(math.exp(nats / (len(held_out) - 1)), 4),
        "bits_per_byte": round(nats / math.log(2) / held_out_bytes, 4),
        "completions": len(sampled),
        "completions_that_parse": sum(map(parses, sampled)),
        "greedy": {prompt: complete(model, tokenizer, prompt) for prompt in PROMPTS},
        "sampled": {prompt: complete(model, tokenizer, prompt, TEMPERATURE) for prompt in PROMPTS},
    }
