"""`lsjax explain` shows what `lsjax.layer_predictions` returns."""

import json
from pathlib import Path

import pytest

import lsjax
from lsjax.cli.main import main

MODEL = Path(__file__).parent.parent / "io" / "recorded" / "llama32"


def test_it_prints_the_table_and_one_line_and_writes_both_files(tmp_path, capsys):
    picture, report = tmp_path / "layers.png", tmp_path / "layers.json"
    arguments = [f"--model={MODEL}", "--prompt=the cat", "--max_new_tokens=6"]
    assert main(["explain", *arguments, f"--output={picture}", f"--report={report}"]) == 0
    expected = lsjax.layer_predictions(lsjax.load(MODEL), "the cat", 6)
    out, err = capsys.readouterr()
    assert err == ""
    *table, summary, named, written = out.splitlines()
    assert summary == expected.summary()
    assert summary.startswith("settled on average at layer ")
    assert " of 3 (prompt: " in summary
    assert (named, written) == (f"picture: {picture}", f"report: {report}")
    settled = [line.split()[1:] for line in table if line.startswith("settled")]
    assert [int(layer) for block in settled for layer in block] == expected.settled_at.tolist()
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(report.read_text())
    assert (data["model"], data["prompt"]) == (str(MODEL), "the cat")
    assert data["tokens"] == expected.tokens.tolist()


def test_the_prompt_alone_is_read_without_new_tokens(capsys):
    assert main(["explain", f"--model={MODEL}", "--prompt=the cat", "--max_new_tokens=0"]) == 0
    assert "continuation" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a"], "give --model=... (see --help)"),
        (["--model={model}"], "give --prompt=... (see --help)"),
        (["--model={tmp}/nope", "--prompt=a"], "does not exist"),
        (["--model={model}", "--prompt=a", "--max_new_tokens=-1"], "max_new_tokens"),
        (["--model={model}", "--prompt=a", "--max_new_tokens=200"], "exceeds the model's context of 128"),
        (["--model={model}", "--prompt=a", "--output={tmp}/a.jpg"], "give a name that ends in .png"),
        (["--model={model}", "--prompt=a", "--output={tmp}/no/a.png"], "its folder does not exist"),
        (["--model={model}", "--prompt=a", "--report={tmp}/no/a.json"], "its folder does not exist"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    status = main(["explain", *(argument.format(model=MODEL, tmp=tmp_path) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
