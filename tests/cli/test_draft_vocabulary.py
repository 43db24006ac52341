"""`lsjax draft_vocabulary`: the list is that of a count by hand, and generate and decode draft from it."""

import collections
import json
import shutil
from pathlib import Path

import pytest

import lsjax
from lsjax.cli.main import main
from lsjax.data.documents import digest_of, is_held_out
from lsjax.tuning import token_counts

MODEL = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
TEXTS = ["the cat sat on the mat", "a cat", "the mat", "on a mat there sat the cat", "it is the end"] * 8


@pytest.fixture
def folder(tmp_path):
    """Returns the folder of a model, beside a corpus of texts."""
    shutil.copytree(MODEL, tmp_path / "model")
    rows = [{"text": f"{text} {number}"} for number, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model"


def test_the_list_ranks_the_tokens_of_the_corpus(folder, monkeypatch, capsys):
    monkeypatch.setattr(token_counts, "SIZES", (8, 16, 100_000))
    texts = folder.parent / "texts.jsonl"
    assert main(["draft_vocabulary", f"--model={folder}", f"--corpus={texts}"]) == 0
    content, model = json.loads((folder / "draft_vocabulary.json").read_text()), lsjax.load(folder)
    parts = [], []
    for number, text in enumerate(TEXTS):
        parts[is_held_out(digest_of(f"{text} {number}".encode()), 0.1)].append(f"{text} {number}")
    train, held_out = (
        collections.Counter(
            token for text in part for token in [*model.tokenizer.encode(text), model.tokenizer.stop[0]]
        )
        for part in parts
    )
    assert dict(zip(content["ids"], content["counts"], strict=True)) == train
    assert content["ids"] == sorted(train, key=lambda token: (-train[token], token))
    assert (content["vocab_size"], content["source"]) == (model.config.vocab_size, str(texts))
    special = {*model.tokenizer.stop, *model.tokenizer.special_tokens.values()}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for size, line in zip((8, 16), lines, strict=False):
        rest = [token for token in content["ids"] if token not in special]
        chosen = {*special, *rest[: max(0, size - len(special))]}
        share = sum(held_out[token] for token in chosen) / held_out.total()
        assert line == f"{size:>7,} tokens cover {share:6.1%} of {held_out.total():,} held-out tokens"
    assert lines[2].startswith(f"{folder / 'draft_vocabulary.json'}: {len(train)} of ")


def test_drafts_from_the_list_leave_the_text_as_it_is(folder, capsys):
    prompt = [f"--model={folder}", "--prompt=the cat", "--max_new_tokens=12"]
    assert main(["generate", *prompt]) == 0
    plain = capsys.readouterr().out.rsplit("\n", 2)[0]
    setting = ["--exit_layer=1", "--num_speculations=3", "--draft_vocabulary=12"]
    assert main(["generate", *prompt, *setting]) == 2
    error = capsys.readouterr().err
    assert f"make it with: lsjax draft_vocabulary --model={folder}" in error
    assert error.count("\n") == 1
    assert main(["draft_vocabulary", f"--model={folder}", f"--corpus={folder.parent / 'texts.jsonl'}"]) == 0
    capsys.readouterr()
    assert main(["generate", *prompt, *setting]) == 0
    out = capsys.readouterr().out
    assert out.rsplit("\n", 2)[0] == plain
    assert "self_speculative, exit layer 1, 3 drafts of 12 ids, " in out
    path, report = folder / "draft_vocabulary.json", folder.parent / "report.json"
    setting = ["--exit_layer=1", f"--draft_vocabulary={path}", "--repeats=1", "--strategies=self_speculative"]
    assert main(["decode", *prompt, *setting, f"--report={report}"]) == 0
    run = json.loads(report.read_text())["runs"][1]
    assert run["draft_vocabulary"] == str(path)
    assert run["matches_autoregressive"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["draft_vocabulary"], "give --model=... (see --help)"),
        (["draft_vocabulary", "--model={model}"], "give --corpus: {model} is not a training workdir"),
        (["draft_vocabulary", "--model={model}", "--corpus=no"], "--corpus 'no' is neither \"python\", nor a folder"),
        (
            ["draft_vocabulary", "--model={model}", "--corpus={tmp}/one.jsonl"],
            "one.jsonl has too few texts",
        ),
        (["draft_vocabulary", "--model={tmp}/no", "--corpus=python"], "no model at {tmp}/no"),
        (["generate", "--model={model}", "--prompt=a", "--exit_layer=1", "--draft_vocabulary=0"], "must be at least 1"),
        (
            ["generate", "--model={model}", "--prompt=a", "--strategy=early_exit", "--draft_vocabulary=9"],
            "--draft_vocabulary has no effect here: it is a setting of self_speculative, and --strategy is early_exit",
        ),
        (
            ["decode", "--model={model}", "--prompt=a", "--strategies=autoregressive", "--draft_vocabulary=9"],
            "--draft_vocabulary is a setting of self_speculative: put it into --strategies",
        ),
        (["decode", "--model={model}", "--prompt=a", "--sweep={tmp}", "--draft_vocabulary=9"], "has no effect here"),
        (["generate", "--model={model}", "--prompt=a", "--exit_layer=1", "--draft_vocabulary={tmp}/x"], "cannot read"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    places = {"model": MODEL, "tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert error.count("\n") == 1
    assert not (MODEL / "draft_vocabulary.json").exists()
