"""The tasks of lm-evaluation-harness on this engine, so that a format's accuracy can stand beside its perplexity.

    from workbench.lm_eval import engine_lm
    lm_eval.simple_evaluate(engine_lm(engine), tasks=["hellaswag"])

or `python -m workbench.lm_eval --weights int4 --kv int8 --tasks hellaswag`. Needs the extra: pip install
'inferlab[lm-eval]'. Most tasks download their data; a folder of task files of one's own comes with --include-path.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError, RequestError
from engine.files import writable
from engine.sampling_params import SamplingParams
from engine.scoring import prompt_logits
from kernels import KV_FORMATS, WEIGHT_FORMATS
from workbench.quality import check_meaning

if TYPE_CHECKING:
    from lm_eval.api.model import LM

EXTRA = "lm_eval is not installed; pip install 'inferlab[lm-eval]'"
MAX_GENERATED = 256
"""Output tokens where a task names no limit, as in the harness's own models."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = {"until", "max_gen_toks", "do_sample", *SAMPLING}


class Answers:
    """The harness's three questions, answered by an engine that does nothing else meanwhile.

    Texts longer than a session lose their beginning, as in the harness's own models.
    """

    def __init__(self, engine: Engine) -> None:
        """ConfigError for a model whose text means nothing, or that has no token to begin a text with."""
        check_meaning(engine)
        self.engine = engine
        self._special = engine.tokenizer.encode("")
        ends = engine.tokenizer.eos_token_ids
        if not self._special and not ends:
            raise ConfigError(f"{engine.model.source} has no special token that a text could begin with")
        self._prefix = self._special or [ends[0]]
        self._longest = min(engine.session_len, engine.memory.tokens_that_fit)

    def loglikelihood(self, pairs: Iterable[tuple[str, str]], *, progress: bool = False) -> list[tuple[float, bool]]:
        """Natural-log probability of each continuation given its context, and whether it is the most likely text."""
        return self._score([self._encode_pair(*pair) for pair in pairs], progress)

    def loglikelihood_rolling(self, texts: Iterable[str], *, progress: bool = False) -> list[float]:
        """Natural-log probability of each whole text: every token once, given as much before it as a session holds."""
        parts: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        totals: list[float] = []
        for text in texts:
            tokens = self._plain(text)
            whole = [*self._prefix[-1:], *tokens]
            for first in range(0, len(tokens), self._longest):
                last = min(first + self._longest, len(tokens))
                parts.append((whole[max(0, last - self._longest) : first + 1], tokens[first:last]))
                owners.append(len(totals))
            totals.append(0.0)
        for owner, (logprob, _) in zip(owners, self._score(parts, progress), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, asks: Iterable[tuple[str, Mapping[str, Any]]], *, progress: bool = False) -> list[str]:
        """Text that follows each context, up to the first of its `until` strings, which is not part of it.

        ConfigError for an option that this engine does not have.
        """
        prompts, params = [], []
        for context, options in asks:
            chosen = self._params(options)
            tokens = self.engine.tokenizer.encode(context) or self._prefix
            prompts.append(tokens[-(self.engine.session_len - chosen.max_tokens) :])
            params.append(chosen)
        return [output.text for output in self.engine.generate(prompts, params, progress=progress)]

    def _params(self, options: Mapping[str, Any]) -> SamplingParams:
        unknown = [name for name in options if name not in _KNOWN]
        if unknown:
            raise ConfigError(f"the task asks for {unknown[0]!r}; what is understood is {', '.join(sorted(_KNOWN))}")
        until = options.get("until") or ()
        stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
        most = min(int(options.get("max_gen_toks", MAX_GENERATED)), self.engine.session_len - 1)
        sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", sampling.get("temperature", 0.0) > 0.0):
            sampling = {name: value for name, value in sampling.items() if name == "repetition_penalty"}
        elif "temperature" not in sampling:
            sampling["temperature"] = 1.0
        return SamplingParams(max_tokens=most, stop=stop, **sampling)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, cut where the context ends when it is encoded alone; spaces at its end go to the
        continuation, because tokens begin with a space rather than end with one."""
        kept = context.rstrip()
        if not kept:
            given, following = self._prefix, self._plain(context + continuation)
        else:
            whole = self.engine.tokenizer.encode(context + continuation)
            given = self.engine.tokenizer.encode(kept)
            following = whole[len(given) :]
        if not following:
            raise RequestError(f"the continuation {continuation!r} has no token of its own")
        if len(following) > self._longest:
            raise RequestError(f"a continuation has {len(following):,} tokens; one session holds {self._longest:,}")
        return given, following

    def _plain(self, text: str) -> list[int]:
        """Without the special tokens that the tokenizer puts before a text."""
        tokens, special = self.engine.tokenizer.encode(text), self._special
        return tokens[len(special) :] if special and tokens[: len(special)] == special else tokens

    def _score(self, parts: Sequence[tuple[list[int], list[int]]], progress: bool) -> list[tuple[float, bool]]:
        """Of each (given, following): the log-probability of what follows, and whether every token is the likeliest.

        In order of length, so that texts computed side by side end together.
        """
        totals, greedy = [0.0] * len(parts), [True] * len(parts)
        order = sorted(range(len(parts)), key=lambda i: -len(parts[i][0]) - len(parts[i][1]))
        inputs = [[*parts[i][0], *parts[i][1][:-1]][-self._longest :] for i in order]
        with tqdm(total=len(parts), disable=not progress, desc="texts scored", unit="text") as bar:
            for place, start, logits in prompt_logits(self.engine, inputs):
                i, size = order[place], len(inputs[place])
                following = parts[i][1]
                first = max(start, size - len(following))  # the first of these rows that predicts a token asked for
                rows = logits[first - start :]
                if len(rows):
                    wanted = following[first - size + len(following) :][: len(rows)]
                    targets = torch.tensor(wanted, device=rows.device)
                    chances = rows.float().log_softmax(-1).gather(1, targets[:, None])
                    totals[i] += float(chances.double().sum())
                    greedy[i] &= bool((rows.argmax(-1) == targets).all())
                bar.update(start + len(logits) == size)
        return list(zip(totals, greedy, strict=True))


def engine_lm(engine: Engine) -> LM:
    """The engine as a model of lm-evaluation-harness. ImportError that says what to install where it is missing."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(EXTRA) from error
    answers = Answers(engine)

    class EngineLM(LM):  # type: ignore[misc]  # the harness ships no types
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = answers.loglikelihood([request.args for request in requests], progress=not disable_tqdm)
            return self._noted("loglikelihood", requests, found)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            found = answers.loglikelihood_rolling([r.args[0] for r in requests], progress=not disable_tqdm)
            return self._noted("loglikelihood_rolling", requests, found)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found = answers.generate_until([request.args for request in requests], progress=not disable_tqdm)
            return self._noted("generate_until", requests, found)

        def _noted(self, kind: str, requests: list[Any], found: list[Any]) -> list[Any]:
            """For the harness's own cache of answers."""
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial(kind, request.args, answer)
            return found

    return EngineLM()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workbench.lm_eval", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="'bundled' (default), a folder, a hub id")
    parser.add_argument("--weights", default="bf16", choices=WEIGHT_FORMATS)
    parser.add_argument("--kv", default="bf16", choices=KV_FORMATS)
    parser.add_argument("--tasks", nargs="+", required=True, help="names of the harness's tasks, or of your own")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, help="examples per task (default: all)")
    parser.add_argument("--fewshot", type=int, help="solved examples before each question (default: the task's)")
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write results, versions and the machine to FILE"
    )
    options = parser.parse_args(argv)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        parser.error(EXTRA)
    try:
        with Engine(EngineConfig(model=options.model, weights=options.weights, kv=options.kv)) as engine:
            description = engine.description
            found = lm_eval.simple_evaluate(
                engine_lm(engine),
                tasks=options.tasks,
                task_manager=TaskManager(include_path=options.include_path),
                limit=options.limit,
                num_fewshot=options.fewshot,
            )
    except (ConfigError, CheckpointError) as error:
        parser.error(str(error))
    figures = json.loads(json.dumps(found["results"], default=str))  # what JSON has no word for becomes text
    print(description)
    for task, values in figures.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items() if _is_figure(value)))
    if options.json:
        from engine.machine import write_report

        record = {"engine": description, "lm_eval": lm_eval.__version__, "results": figures}
        write_report(options.json, record, argv)
    return 0


def _is_figure(value: object) -> bool:
    return isinstance(value, float)


if __name__ == "__main__":
    sys.exit(main())
