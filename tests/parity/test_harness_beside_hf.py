"""The adapter for lm-evaluation-harness gives the figures and texts of lm-eval's own `hf` model on the same weights.

An exit is a whole model of its own for transformers: the first layers, with the same final norm and head.
"""

import copy
import json
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import lsjax  # noqa: E402
from lsjax.data.tokenizer import train_tokenizer  # noqa: E402
from lsjax.experiments.harness import HarnessModel  # noqa: E402
from lsjax.io.huggingface import write_huggingface  # noqa: E402

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "self"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""
SOURCE = Path(json.__file__).read_text()
QUERIES = [SOURCE[start : start + size] for start, size in ((0, 1), (40, 20), (700, 55), (1500, 190), (2200, 420))]
TASKS = {
    "own_choice": (
        CHOICE,
        [
            {
                "query": query,
                "choices": [" self", "\n    return value", " the JSON object to decode", "x"],
                "label": i % 4,
            }
            for i, query in enumerate(QUERIES)
        ],
    ),
    "own_text": (ROLLING, [{"text": SOURCE[:size]} for size in (1, 30, 300, 900, 2500)]),
    "own_generation": (GENERATE, [{"query": query, "answer": "x"} for query in QUERIES]),
}


@pytest.fixture(
    scope="module",
    params=[(None, True), (None, False), (2, True)],
    ids=["last layer", "last layer, texts not opened", "exit layer 2"],
)
def models(request, varied, varied_params, tmp_path_factory):
    """Returns (ours, a function that makes theirs) for a random model that we exported to the Hugging Face layout.

    Its tokenizer opens each text with its bos_token, or names a bos_token that it puts before no text.
    """
    exit_layer, opens = request.param
    folder = tmp_path_factory.mktemp("exported")
    write_huggingface(folder, varied, varied_params, train_tokenizer([SOURCE], varied.vocab_size))
    if not opens:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    theirs.model.layers = theirs.model.layers[:exit_layer]
    theirs.config.num_hidden_layers = len(theirs.model.layers)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = HarnessModel(lsjax.load(folder), exit_layer=exit_layer, batch_size=4)
    return ours, lambda **settings: HFLM(theirs, tokenizer=copy.deepcopy(tokenizer), device="cpu", **settings)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, (text, rows) in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + text)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model, tasks, names):
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True)


def responses(report, name):
    return [sample["resps"] for sample in sorted(report["samples"][name], key=lambda sample: sample["doc_id"])]


def metrics(report, name):
    return {metric: value for metric, value in report["results"][name].items() if isinstance(value, float)}


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def assert_equal(ours, theirs):
    """Compares lists of (log-likelihood, is greedy) to 1e-4 nats."""
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-4)


def test_metrics_and_answers_on_local_tasks_are_equal(models, tasks):
    ours, hf = models
    names = ["own_choice", "own_generation"]
    report, expected = evaluate(ours, tasks, names), evaluate(hf(), tasks, names)
    for found, wanted in zip(responses(report, "own_choice"), responses(expected, "own_choice"), strict=True):
        assert_equal([each[0] for each in found], [each[0] for each in wanted])
    texts = responses(report, "own_generation")
    assert texts == responses(expected, "own_generation")
    assert len({str(text) for text in texts}) > 1
    for name in names:
        assert metrics(report, name) == pytest.approx(metrics(expected, name), rel=1e-5)


def test_whole_texts_in_rolling_windows_are_equal(models, tasks):
    ours, hf = models
    # Without add_bos_token=False, `hf` would count a bos_token that the tokenizer adds as the first token to predict.
    report = evaluate(ours, tasks, ["own_text"])
    expected = evaluate(hf(add_bos_token=False), tasks, ["own_text"])
    totals = [resps[0][0] for resps in responses(report, "own_text")]
    assert totals == pytest.approx([resps[0][0] for resps in responses(expected, "own_text")], abs=1e-4, rel=1e-6)
    assert len(ours.tok_encode(SOURCE[:2500])) > 3 * ours.max_length
    assert metrics(report, "own_text") == pytest.approx(metrics(expected, "own_text"), rel=1e-5)


def test_odd_pairs_are_equal_in_any_batch(models):
    ours, hf = models
    pairs = [
        ("", "def loads"),
        ("import ", "json"),  # the space moves to the continuation
        ("a", "\n" * 40),
        (SOURCE[:1200], " value"),  # longer than the context: its end counts
        (SOURCE[:1200], SOURCE[1200:1300]),
        ("x = ", "\u00e9\U0001f600"),  # characters of several tokens
        *((SOURCE[start : start + 9 * start % 170 + 1], SOURCE[-start - 9 :][:7]) for start in range(0, 200, 13)),
    ]
    expected = hf().loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert_equal(ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True), expected)
    assert len({total for total, _ in expected}) == len(pairs)


def test_a_greedy_continuation_is_greedy_for_both(models):
    ours, hf = models
    settings = {"until": [], "max_gen_toks": 6}
    (text,) = ours.generate_until(requests("generate_until", ("class JSON", settings)))
    pairs = [("class JSON", text), ("class JSON", "q" + text)]
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert_equal(found, hf().loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True))


def test_texts_are_equal_for_every_setting(models):
    ours, hf = models
    asked = [
        ("", {"until": [], "max_gen_toks": 8}),
        ("a", {"until": "e", "max_gen_toks": 30}),
        (SOURCE[:1500], {"until": ["):", "\n\n"], "max_gen_toks": 16}),  # the end of what fits is read
        ("def loads(", {"until": ["\n"], "max_new_tokens": 12, "do_sample": False, "temperature": 1}),
        ("def dumps(", {"until": ["\n"], "max_new_tokens": 12, "do_sample": False, "temperature": 1}),
    ]
    if ours.model.tokenizer.begin is None:
        asked = asked[1:]  # `hf` generates nothing from no token
    expected = hf().generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", *asked)) == expected
    assert len(set(expected)) > 2
