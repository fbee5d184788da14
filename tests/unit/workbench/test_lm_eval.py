"""The harness's questions: answers against the engine's own scores, and a task from a local file where it is there."""

import importlib.util
import json
import math

import pytest

from engine.bundled import heldout_text
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.sampling_params import SamplingParams
from workbench.lm_eval import EXTRA, Answers, engine_lm

TEXT = heldout_text()[2000:]
INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture(scope="module")
def engine():
    with Engine(EngineConfig(impl="torch", device="cpu", memory_limit=200 * 10**6, session_len=192)) as engine:
        yield engine


@pytest.fixture(scope="module")
def answers(engine):
    return Answers(engine)


def known(engine, tokens):
    """Log-probability of every token after the first, from the engine's scheduler instead of its chunks."""
    params = SamplingParams(prompt_logprobs=True, max_tokens=1, ignore_eos=True)
    return list(engine.generate([tokens], params)[0].prompt_logprobs)


def test_loglikelihood_is_that_of_the_engine(engine, answers):
    pairs = [("def add(a, b):\n    return", " a + b"), ("import os", "\nimport sys\n"), ("x = [1, 2, ", "3]")]
    found = answers.loglikelihood(pairs)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        whole = engine.tokenizer.encode(context + continuation)
        start = len(engine.tokenizer.encode(context.rstrip()))
        assert logprob == pytest.approx(sum(known(engine, whole)[start - 1 :]), abs=5e-3)


def test_spaces_at_the_end_of_a_context_belong_to_what_follows(answers):
    assert answers.loglikelihood([("return ", "None")]) == answers.loglikelihood([("return", " None")])


def test_the_greedy_continuation_is_recognized(engine, answers):
    prompt = engine.tokenizer.encode("def fibonacci(n):\n")
    likely = engine.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))[0].text
    pairs = [("def fibonacci(n):\n", likely), ("def fibonacci(n):\n", likely[:-4] + "zzzz")]
    scored = answers._score([(prompt, engine.tokenizer.encode(text)) for _, text in pairs], False)
    assert [greedy for _, greedy in scored] == [True, False]


def test_an_empty_context_is_the_beginning_of_a_text(engine, answers):
    (logprob, _), tokens = answers.loglikelihood([("", "import os")])[0], engine.tokenizer.encode("import os")
    begin = engine.tokenizer.eos_token_ids[0]
    assert logprob == pytest.approx(sum(known(engine, [begin, *tokens])), abs=5e-3)
    assert answers.loglikelihood_rolling(["import os"]) == [logprob]


def test_a_rolling_text_scores_every_token_once_with_as_much_before_it_as_fits(engine, answers):
    tokens = engine.tokenizer.encode(TEXT)[:480]
    text = engine.tokenizer.decode(tokens)
    tokens = engine.tokenizer.encode(text)
    whole = [engine.tokenizer.eos_token_ids[0], *tokens]
    longest, expected = answers._longest, 0.0
    assert longest == 192 < len(tokens)
    for first in range(0, len(tokens), longest):
        last = min(first + longest, len(tokens))
        window = whole[max(0, last - longest) : last]
        scored = answers._score([(window[: len(window) - (last - first) + 1], tokens[first:last])], False)
        expected += scored[0][0]
    assert answers.loglikelihood_rolling([text, "x"])[0] == pytest.approx(expected, abs=1e-3)
    shorter = [sum(known(engine, whole[i : i + 150])) for i in range(0, len(whole) - 1, 149)]
    assert answers.loglikelihood_rolling([text])[0] > sum(shorter)  # the same tokens with less before them


def test_texts_longer_than_a_session_lose_their_beginning(engine, answers):
    long = TEXT[:3000]
    (cut, _), (shorter, _) = answers.loglikelihood([(long, " = 1"), (long[-700:], " = 1")])
    assert math.isfinite(cut) and cut == pytest.approx(shorter, abs=5e-3)
    with pytest.raises(RequestError, match="one session holds 192"):
        answers.loglikelihood([("a", TEXT[:3000])])
    assert answers.generate_until([(long, {"until": ["\n"], "max_gen_toks": 8})])


def test_text_is_generated_until_a_stop(engine, answers):
    context = "def fibonacci(n):\n"
    free = answers.generate_until([(context, {"until": [], "max_gen_toks": 24})])[0]
    assert free == engine.generate([context], SamplingParams(max_tokens=24))[0].text
    assert "\n" in free.strip()
    stopped = answers.generate_until([(context, {"until": "\n", "max_gen_toks": 24, "do_sample": False})])[0]
    assert stopped == free.partition("\n")[0]
    assert answers._params({"temperature": 0.7}).temperature == 0.7
    assert answers._params({"temperature": 0.7, "do_sample": False}).greedy and answers._params({}).max_tokens == 191
    with pytest.raises(ConfigError, match="the task asks for 'num_beams'"):
        answers.generate_until([(context, {"num_beams": 4})])


def test_refusals(engine, answers):
    with pytest.raises(RequestError, match="no token of its own"):
        answers.loglikelihood([("a", "")])
    with (
        Engine(EngineConfig(model="synthetic:tiny", memory_limit=30 * 10**6)) as synthetic,
        pytest.raises(ConfigError, match="'synthetic:tiny' has no perplexity here"),
    ):
        Answers(synthetic)


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_it_says_what_to_install(engine):
    with pytest.raises(ImportError, match="inferlab"):
        engine_lm(engine)


TASKS = {
    "choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choice.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "rolling": """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/rolling.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
    "until": """
task: local_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/until.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.mark.skipif(not INSTALLED, reason=EXTRA)
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_local_task_runs_in_the_harness(engine, answers, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    follow = answers.generate_until([("import os\nimport", {"until": ["\n"], "max_gen_toks": 16})])[0]
    rolling = TEXT[:600]
    rows = {
        "choice": [
            {"context": "import os\nimport", "options": [" zebra_quux", follow], "answer": 1},
            {"context": "for i in range", "options": ["(10):", "}}))"], "answer": 0},
        ],
        "rolling": [{"text": rolling}],
        "until": [{"context": "import os\nimport", "answer": follow}, {"context": "x = ", "answer": "never this"}],
    }
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.format(folder=tmp_path))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    names = [f"local_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(engine_lm(engine), tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    assert found["local_choice"]["acc,none"] == 1.0
    assert found["local_until"]["exact_match,none"] == 0.5
    nats = -answers.loglikelihood_rolling([rolling])[0]
    bits = nats / math.log(2) / len(rolling.encode())
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
