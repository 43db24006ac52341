"""The adapter for lm-evaluation-harness: its figures on local task files are sums of `lsjax.forward` and our texts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import lsjax  # noqa: E402
from lsjax.errors import UserError  # noqa: E402
from lsjax.experiments.harness import HarnessModel  # noqa: E402
from tests.evaluation.test_likelihood import by_forward  # noqa: E402

MODEL = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
TEXT = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ROWS = [
    {"query": "the cat", "choices": [" sat", " mat on", " it"], "label": 0},
    {"query": "on the mat there", "choices": [" is", " cat", " a"], "label": 1},
    {"query": "a", "choices": [" b", " c c c", " d"], "label": 2},
]
LONG = "the cat sat on the mat, and there it is. " * 12


@pytest.fixture(scope="module")
def model():
    return lsjax.load(MODEL)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "text.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "text.yaml").write_text(TEXT.format(folder=folder))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("exit_layer", [None, 1])
def test_figures_on_local_tasks_are_those_of_forward(model, tasks, exit_layer):
    adapter = HarnessModel(model, exit_layer=exit_layer)
    names = ["own_choice", "own_text"]
    report = lm_eval.simple_evaluate(model=adapter, tasks=names, task_manager=tasks, bootstrap_iters=0)
    config, layer = model.config, exit_layer or model.config.num_layers
    right = 0
    for row in ROWS:
        context = model.tokenizer.encode(row["query"])
        whole = [model.tokenizer.encode(row["query"] + " " + choice.strip()) for choice in row["choices"]]
        sums = [by_forward(model.params, config, context, ids[len(context) :], layer)[0] for ids in whole]
        right += int(np.argmax(sums)) == row["label"]
    assert report["results"]["own_choice"]["acc,none"] == pytest.approx(right / len(ROWS))

    tokens = model.tokenizer.encode(LONG)
    length = config.context_length
    total, _ = by_forward(model.params, config, [adapter.prefix_token_id], tokens[:length], layer)
    for start in range(length, len(tokens), length):  # windows of a whole context, each token predicted once
        part = tokens[start : start + length]
        context = tokens[start + len(part) - length - 1 : start]
        total += by_forward(model.params, config, context, part, layer)[0]
    bits = -total / math.log(2) / len(LONG.encode())
    assert report["results"]["own_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


def requests(*arguments):
    return [
        Instance(request_type="generate_until", doc={}, arguments=each, idx=index)
        for index, each in enumerate(arguments)
    ]


def test_texts_are_those_of_generate(model):
    short, long = {"until": ["e"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 6}
    asked = requests(("the cat", short), ("it is", long), ("a", short))
    expected = [
        lsjax.generate(model, "the cat", 12, stop=["e"]).text[0],
        lsjax.generate(model, "it is", 6).text[0],
        lsjax.generate(model, "a", 12, stop=["e"]).text[0],
    ]
    assert HarnessModel(model).generate_until(asked) == expected
    assert HarnessModel(model, strategy=lsjax.SelfSpeculative(1, 3)).generate_until(asked) == expected
    early = lsjax.generate(model, "it is", 6, lsjax.EarlyExit(1)).text[0]
    assert HarnessModel(model, exit_layer=1).generate_until(asked)[1] == early != expected[1]


def test_a_wrong_setting_is_one_line(model):
    with pytest.raises(UserError, match="exit_layer 4 is out of range"):
        HarnessModel(model, exit_layer=4)
    with pytest.raises(UserError, match="goes with no other strategy"):
        HarnessModel(model, exit_layer=1, strategy=lsjax.SelfSpeculative(1, 3))
    with pytest.raises(UserError, match="max_gen_toks 128 leaves no room for a prompt in a context of 128"):
        HarnessModel(model).generate_until(requests(("a", {"until": [], "max_gen_toks": 128})))
    for name, value in (("num_beams", 4), ("min_p", 0.1)):
        with pytest.raises(UserError, match=f"generation_kwargs: {name} {value} is not supported"):
            HarnessModel(model).generate_until(requests(("a", {"until": [], "max_gen_toks": 4, name: value})))
    with pytest.raises(UserError, match="a continuation has 130 tokens, but the model's context is 128"):
        HarnessModel(model).loglikelihood([Instance("loglikelihood", {}, ("a", "b" * 130), 0)])


def test_texts_are_drawn_as_a_task_asks(model):
    common = {"until": [], "max_gen_toks": 10}
    for asked, sampling in (
        ({"temperature": 2.0}, lsjax.Sampling(2.0)),
        ({"temperature": 2.0, "do_sample": True, "top_k": 3, "top_p": 0.9}, lsjax.Sampling(2.0, 3, 0.9)),
        ({"temperature": 2.0, "do_sample": False, "top_p": 0.9}, lsjax.Sampling()),
    ):
        (text,) = HarnessModel(model).generate_until(requests(("it is", common | asked)))
        assert text == lsjax.generate(model, "it is", 10, sampling=sampling).text[0]
