"""The demo, with a small model in place of the one that ships."""

import dataclasses
import json

import pytest

import lsjax
from lsjax.experiments.demo import DemoSettings, run_demo
from tests.helpers.recorded import copy_of
from tests.helpers.runs import continuing, replace

pytestmark = pytest.mark.usefixtures("compilation_cache")

SMALL = DemoSettings(num_speculations=(2,), lookup=2, prompts=2, prompt_tokens=8, max_new_tokens=8, repeats=1)


@pytest.fixture
def config(tiny_run, tmp_path):
    config = continuing(tiny_run, copy_of("llama32", tmp_path / "model"))
    return replace(config, layerskip={"draft_exit": 1, "exit_curriculum": "none", "exit_weight_floor": 0.5})


def test_a_model_before_and_after(config, tmp_path, capsys):
    report = run_demo(config, tmp_path / "run", SMALL)
    printed = capsys.readouterr().out
    for text in (
        "as it comes",
        "loss before",
        "loss after",
        "greedy, before:",
        "T=0.8, after:",
        "last layer's held-out",
    ):
        assert text in printed
    assert (tmp_path / "run" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == json.loads(json.dumps(report))
    for tree in report.values():
        runs = tree["decoding"]["greedy"]["runs"]
        assert [run["lookup"] for run in runs if run["strategy"] == "self_speculative"] == [0, 2]
        assert all(run["matches_autoregressive"] for run in runs)
        assert all(run["matches_autoregressive"] is None for run in tree["decoding"]["T=0.8"]["runs"])
    before, after = (report[name]["profile"]["loss"] for name in ("before", "after"))
    assert before[-1] != after[-1]

    # A second run neither trains nor measures the initial model again.
    path = tmp_path / "run" / "before.json"
    tree = json.loads(path.read_text())
    tree["profile"]["loss"][-1] = 7.77
    path.write_text(json.dumps(tree))
    run_demo(config, tmp_path / "run", SMALL)
    assert "7.77" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "settings", "message"),
    [
        ({"initial_model": ""}, SMALL, "set config.initial_model"),
        ({"layerskip": {"draft_exit": 0}}, SMALL, "set config.layerskip.draft_exit"),
        ({}, DemoSettings(exit_layers=(9,)), "exit_layer"),
        ({}, DemoSettings(max_new_tokens=4096), "raise config.model.context_length"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(config, tmp_path, sections, settings, message):
    initial = sections.pop("initial_model", config.initial_model)
    config = dataclasses.replace(replace(config, **sections), initial_model=initial)
    with pytest.raises(lsjax.UserError, match=message):
        run_demo(config, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()
