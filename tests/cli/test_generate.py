"""`lsjax generate`: streams one text, or writes a line per prompt; what it writes is what `lsjax.generate` returns."""

import contextlib
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import lsjax
from lsjax.cli import generate as command
from lsjax.cli.decoding_flags import trained_draft_exit
from lsjax.cli.main import main
from lsjax.config import Config
from lsjax.errors import UserError

MODEL = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
PROMPTS = ["the cat", "a", "on the mat there sat", "the cat", "it is"]


def run(*arguments, encoding="utf-8"):
    """Returns (status, standard output, standard error) of `lsjax generate`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["generate", *map(str, arguments)])
    return status, out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def model():
    return lsjax.load(MODEL)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def read_lines(text):
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda record: record["prompt"])


def test_one_prompt_is_streamed_and_ends_with_a_line_of_figures(model):
    status, out, err = run(f"--model={MODEL}", "--prompt=the cat", "--max_new_tokens=12")
    assert status == 0, err
    assert err == ""
    text, figures, end = out.rsplit("\n", 2)
    assert text == lsjax.generate(model, "the cat", 12).text[0]
    assert figures.startswith("12 tokens, ")
    assert " tokens/s, autoregressive, compiled in " in figures
    assert end == ""


def test_drafts_leave_the_text_as_it_is_and_are_counted(model, tmp_path):
    path = tmp_path / "out.jsonl"
    setting = ["--exit_layer=1", "--num_speculations=3"]
    status, out, err = run(f"--model={MODEL}", "--prompt=the cat", "--max_new_tokens=12", *setting, f"--output={path}")
    assert status == 0, err
    result = lsjax.generate(model, "the cat", 12, lsjax.SelfSpeculative(1, 3))
    assert out.startswith(result.text[0] + "\n")
    assert "self_speculative, exit layer 1, 3 drafts, " in out
    assert f"{result.stats[0]['acceptance_rate']:.0%} of drafts accepted" in out
    (record,) = read_lines(path.read_text())
    assert record["tokens"] == result.tokens[0]
    assert record["stats"]["accepted"] == result.stats[0]["accepted"]


@pytest.mark.parametrize("stop", [[], ["--stop=e"]])
def test_prompts_give_a_line_each(model, prompts, tmp_path, stop):
    path = tmp_path / "out.jsonl"
    arguments = [f"--model={MODEL}", f"--prompts={prompts}", "--batch_size=2", "--max_new_tokens=12", *stop]
    status, out, err = run(*arguments, f"--output={path}")
    assert (status, out) == (0, ""), err
    assert "5 prompts, " in err
    records = read_lines(path.read_text())
    expected = lsjax.generate(model, PROMPTS, 12, stop=["e"] if stop else [])
    assert [record["prompt"] for record in records] == sorted(PROMPTS)
    assert all(list(record) == ["prompt", "text", "tokens", "finish_reason", "stats"] for record in records)
    for record in records:
        index = PROMPTS.index(record["prompt"])
        assert record["text"] == expected.text[index]
        assert record["tokens"] == expected.tokens[index]
        assert record["finish_reason"] == expected.stats[index]["finish_reason"]
        assert record["stats"]["new_tokens"] == len(record["tokens"])


def test_samples_are_those_of_the_seed(model, prompts):
    sampling = ["--temperature=1", "--top_k=20", "--seed=5", "--max_new_tokens=8"]
    status, out, err = run(f"--model={MODEL}", f"--prompts={prompts}", *sampling)
    assert status == 0, err
    expected = lsjax.generate(model, PROMPTS, 8, sampling=lsjax.Sampling(1.0, 20), seed=5)
    assert sorted(record["text"] for record in read_lines(out)) == sorted(expected.text)


def test_lines_may_hold_settings_of_their_own(model, tmp_path):
    path, sampling = tmp_path / "prompts.jsonl", ["--temperature=0.7", "--top_k=20", "--seed=5", "--max_new_tokens=8"]
    lines = [
        {"prompt": "the cat"},
        {"prompt": "a", "temperature": 0, "id": 7},
        {"prompt": "on the mat", "temperature": 1.2, "top_k": 0, "top_p": 0.9, "max_new_tokens": 3},
        {"prompt": "it is", "stop": "e", "stop_tokens": [9], "max_new_tokens": 12},
        {"prompt": "it was", "stop": []},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = run(f"--model={MODEL}", f"--prompts={path}", *sampling, "--batch_size=2", "--stop=q")
    assert status == 0, err
    expected = lsjax.generate(
        model,
        [line["prompt"] for line in lines],
        [8, 8, 3, 12, 8],
        sampling=lsjax.Sampling([0.7, 0, 1.2, 0.7, 0.7], [20, 0, 0, 20, 20], [1, 1, 0.9, 1, 1]),
        seed=5,
        stop=[["q"], ["q"], ["q"], ["e"], []],
        stop_tokens=[[], [], [], [9], []],
    )
    records = {record["prompt"]: record for record in map(json.loads, out.splitlines())}
    for index, line in enumerate(lines):
        assert records[line["prompt"]]["tokens"] == expected.tokens[index]
        assert records[line["prompt"]]["text"] == expected.text[index]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 (greedy) or in 1e-06..1e+30, got -1"),
        ({"temperature": [0.5]}, "temperature must be a number, got [0.5]"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_k": 3}, "top_k and top_p need a temperature above 0"),
        ({"temperature": 1, "top_p": "0.5"}, "top_p must be a number, got '0.5'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": [4]}, "max_new_tokens must be a whole number, got [4]"),
        ({"stop": [["a"]]}, "stop must be non-empty texts, got ['a']"),
        ({"stop_tokens": [[1]]}, "stop_tokens must be token ids, got [[1]]"),
        ({"stop_tokens": [10**6]}, "stop_tokens holds 1000000, outside the vocabulary"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line(tmp_path, own, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"prompt": "b"} | own) + "\n")
    status, out, err = run(f"--model={MODEL}", f"--prompts={path}", f"--output={tmp_path}/out.jsonl")
    assert (status, out) == (2, ""), err
    assert f"{path}:3: {message}" in err
    assert err.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_the_benchmark_refuses_settings_of_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "b", "temperature": 1}) + "\n")
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert main(["decode", f"--model={MODEL}", f"--prompts={path}"]) == 2
    assert f'{path}:1: "temperature" is for `lsjax generate`' in err.getvalue()


def test_a_terminal_that_is_not_utf_8_gets_replacement_signs():
    status, out, err = run(f"--model={MODEL}", "--prompt=é", "--max_new_tokens=20", encoding="ascii")
    assert (status, err) == (0, ""), err
    assert "compiled in" in out


def test_a_seed_without_effect_is_said_to_have_none():
    _, _, err = run(f"--model={MODEL}", "--prompt=a", "--max_new_tokens=2", "--seed=3")
    assert err.startswith("--seed has no effect: decoding is greedy at --temperature=0\n")


def test_a_model_with_a_draft_exit_drafts_from_it(tmp_path):
    config = Config.from_dict({"layerskip": {"draft_exit": 3}})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert draft_exit(model=str(tmp_path)) == 3
    assert draft_exit(model=str(MODEL), adapter=str(tmp_path)) == 3
    (tmp_path / "config.json").write_text(json.dumps(Config().to_dict()))
    assert draft_exit(model=str(tmp_path)) is None
    assert draft_exit(model=str(MODEL)) is None
    assert draft_exit(model=str(tmp_path / "nothing")) is None


def draft_exit(model, adapter=None):
    return trained_draft_exit(SimpleNamespace(model=model, adapter=adapter))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a"], "give --model=... (see --help)"),
        (["--model={model}"], "give --prompt=TEXT or --prompts=FILE.jsonl"),
        (["--model={model}", "--prompt=a", "--prompts=b"], "give --prompt or --prompts, not both"),
        (["--model={tmp}/nope", "--prompt=a"], "does not exist"),
        (["--model={model}", "--prompt=a", "--batch_size=2"], "--batch_size has no effect here: there is one prompt"),
        (["--model={model}", "--prompt=a", "--strategy=early_exit", "--lookup=2"], "--lookup has no effect here"),
        (["--model={model}", "--prompt=a", "--strategy=autoregressive", "--exit_layer=1"], "runs all layers"),
        (["--model={model}", "--prompt=a", "--strategy=early_exit", "--exit_layer=auto"], "give a number"),
        (["--model={model}", "--prompt=a", "--exit_layer=9"], "exit_layer 9 is out of range"),
        (["--model={model}", "--prompt=a", "--top_k=3"], "top_k and top_p need a temperature"),
        (["--model={model}", "--prompt=a", "--output={tmp}/no/out.jsonl"], "its folder does not exist"),
        (["--model={model}", "--prompt=a", "--output={tmp}/full.jsonl"], "holds something already"),
        (["--model={model}", "--prompts={tmp}/no.jsonl"], "no.jsonl"),
        (["--model={model}", "--prompt=a", "--chat"], "no chat template"),
        (["--model={model}", "--prompt=a", "--draft_weights=int8", "--weights=int8"], "--draft_weights"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    (tmp_path / "full.jsonl").write_text("{}\n")
    status, out, err = run(*(argument.format(model=MODEL, tmp=tmp_path) for argument in arguments))
    assert (status, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full.jsonl"]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path, write = tmp_path / "out.jsonl", os.write
    append = command._line_writer(str(path))
    append({"prompt": "a"})
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:4]))
    with pytest.raises(UserError, match=r"cannot write --output .*: the disk is full"):
        append({"prompt": "b"})
    assert path.read_text() == '{"prompt": "a"}\n'
