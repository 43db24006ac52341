"""Tuned settings beside a model: "auto" takes the nearest one and measures nothing, or says why it measures."""

import dataclasses
import json
import logging
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import lsjax
from lsjax.cli.main import main
from lsjax.decoding.program import DecodeProgram
from lsjax.tuning import cost_model, round_times, tuned_settings
from lsjax.tuning.tuned_settings import FILE, TunedSetting, TunedSettings, describe_use, read_settings, write_settings

RECORDED = Path(__file__).parent.parent / "io" / "recorded" / "llama32"
PROMPTS = ["the cat sat", "a mat"]
AUTO = lsjax.SelfSpeculative("auto", "auto")


@pytest.fixture
def model(tmp_path):
    """Returns a model of 3 layers, loaded from a folder of its own."""
    shutil.copytree(RECORDED, tmp_path / "model")
    tuned_settings._say_once.cache_clear()
    return lsjax.load(tmp_path / "model")


@pytest.fixture
def decodings(monkeypatch):
    """Returns the list of the strategies that are decoded by, in order."""
    found, run = [], DecodeProgram.run

    def counted(program, *arguments, **more):
        found.append(program.strategy)
        return run(program, *arguments, **more)

    monkeypatch.setattr(DecodeProgram, "run", counted)
    return found


@pytest.fixture
def measurements(monkeypatch):
    """Counts the times that "auto" measures, and finds nothing that is faster than autoregressive decoding."""
    found = []
    monkeypatch.setattr(cost_model, "measure_settings", lambda *_, **__: found.append("measured"))
    return found


def keep(model, *settings):
    """Writes a table of (temperature, batch size, exit layer, drafts) beside a model. Returns its path."""
    rows = tuple(TunedSetting(*setting, draft_vocabulary=None, predicted_speedup=1.1) for setting in settings)
    path = Path(model.path) / FILE
    write_settings(path, TunedSettings(rows, describe_use(model)))
    return path


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_digest_of_weights_reads_one_row_of_each_array(model, monkeypatch):
    read = []

    def asarray(array):
        read.append(array.shape)
        return np.asarray(array)

    counted = types.SimpleNamespace(asarray=asarray, ascontiguousarray=np.ascontiguousarray)
    monkeypatch.setattr(tuned_settings, "np", counted)  # numpy's own would count JAX's calls too
    describe_use(model)
    assert len(read) == len(jax.tree.leaves(model.decoder_weights()))
    assert all(len(shape) == 1 for shape in read)


def test_a_table_is_measured_once_and_then_nothing_is(model, decodings, caplog):
    table = lsjax.tune_table(model, PROMPTS, 6, temperatures=(0.0,), batch_sizes=(2,))
    assert [setting[:2] for setting in table.settings] == [(0.0, 2)]
    assert read_settings(Path(model.path) / FILE, 3) == table
    assert len(decodings) > 20  # the measuring

    again = lsjax.load(model.path)
    lsjax.PROGRAM_CACHE.clear()
    decodings.clear()
    compiled = lsjax.PROGRAM_CACHE.misses
    for _ in range(2):
        result = lsjax.generate(again, PROMPTS, 6, AUTO)
        assert lsjax.PROGRAM_CACHE.misses - compiled == 1
    assert decodings == [table.settings[0].strategy] * 2
    assert messages(caplog) == [f'"auto" takes a setting of {Path(model.path) / FILE}: {table.settings[0]}']
    assert result.tokens == lsjax.generate(again, PROMPTS, 6).tokens


def test_where_drafts_lose_the_table_says_so(model, monkeypatch):
    """The device is made up: a round of drafts is fast for one sequence and slow for two."""

    def made_up_times(model, batch, strategies, note):
        return [1.0, *(0.1 * s.num_speculations * batch.batch_size**20 for s in strategies[1:])]

    monkeypatch.setattr(round_times, "round_times_of", made_up_times)
    table = lsjax.tune_table(model, PROMPTS, 6, temperatures=[0.0, 0.8], batch_sizes=[1, 2])
    assert [setting[:2] for setting in table.settings] == [(0.0, 1), (0.0, 2), (0.8, 1), (0.8, 2)]
    alone, two = table.settings[:2]
    assert alone.strategy == lsjax.SelfSpeculative(alone.exit_layer, alone.num_speculations, alone.draft_weights)
    assert alone.num_speculations >= 1
    assert alone.predicted_speedup > 1
    assert two[2:5] == (None, 0, None)
    assert two.strategy == lsjax.Autoregressive()
    assert two.predicted_speedup < 1
    assert "batch size 2: autoregressive (d=0)" in str(two)
    assert lsjax.generate(model, PROMPTS[:1], 6, AUTO).stats[0]["num_speculations"] == alone.num_speculations
    assert lsjax.generate(model, PROMPTS, 6, AUTO).stats[0]["strategy"] == "autoregressive"


@pytest.mark.parametrize(
    ("temperature", "batch_size", "drafts"),
    [
        (0.0, 1, 1), (0.3, 1, 1), (0.4, 1, 4), (0.5, 1, 4), (5.0, 1, 4),
        (0.0, 2, 1), (0.0, 3, 2), (0.0, 6, 2), (0.0, 8, 3), (0.0, 20, 3), (0.7, 2, 4), (0.7, 3, 5),
    ],
)  # fmt: skip
def test_the_nearest_setting_is_taken(model, temperature, batch_size, drafts):
    """Batch sizes 1, 4, 16 greedily and 1, 4 at 0.8; 2 lies halfway between 1 and 4, and 8 between 4 and 16."""
    rows = [(0.0, 1, 1, 1), (0.0, 4, 1, 2), (0.0, 16, 1, 3), (0.8, 1, 1, 4), (0.8, 4, 1, 5)]
    table = TunedSettings(tuple(TunedSetting(*row, None, 1.1) for row in rows), {})
    found = table.nearest(temperature, batch_size)
    halfway = {(0.0, 2): 2, (0.7, 2): 5}  # the larger batch
    assert found.num_speculations == halfway.get((temperature, batch_size), drafts)


@pytest.mark.parametrize(
    ("temperature", "batch_size", "drafts"), [(0.0, None, 2), (0.0, 1, 1), (0.9, 1, 3), ([0.9, 0.7], None, None)]
)
def test_a_request_takes_the_setting_of_its_temperature_and_batch_size(
    model, decodings, temperature, batch_size, drafts
):
    keep(model, (0.0, 1, 1, 1), (0.0, 2, 2, 2), (0.8, 1, 1, 3), (0.8, 2, None, 0))
    sampling = lsjax.Sampling(temperature=temperature)
    stats = lsjax.generate(model, PROMPTS, 4, AUTO, sampling, batch_size=batch_size).stats[0]
    assert stats["num_speculations"] == drafts
    assert len(decodings) == 1


def test_streams_take_it_too(model, decodings):
    keep(model, (0.0, 1, 2, 3))
    *_, last = lsjax.stream(model, PROMPTS[0], 4, AUTO)
    assert (last.stats["exit_layer"], last.stats["num_speculations"]) == (2, 3)
    assert not decodings


def line_of_measuring(model, measurements, caplog) -> str:
    """Decodes by "auto", asserts that this measures, and returns the line about it."""
    result = lsjax.generate(model, PROMPTS[:1], 2, AUTO)
    assert measurements == ["measured"]
    assert result.stats[0]["strategy"] == "autoregressive"
    (line,) = messages(caplog)
    assert line.startswith('"auto" measures, at every call: ')
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "key", ["weights", "dtype", "cache", "kernels", "draft_vocabulary", "device", "devices", "jax"]
)
def test_a_table_of_something_else_is_not_used(model, measurements, caplog, key):
    path = keep(model, (0.0, 1, 1, 1))
    content = json.loads(path.read_text())
    content["tuned_for"][key] = "another"
    path.write_text(json.dumps(content))
    line = line_of_measuring(model, measurements, caplog)
    assert f"{path} was tuned with {key} 'another', and here it is " in line
    assert line.endswith(f"renew it with: lsjax tune --model={model.path}")


def test_another_use_of_the_model_is_something_else(model):
    here = describe_use(model)
    last_layer_changed = jax.tree.map(lambda a: a.at[-1].multiply(1.01), model.params["layers"])
    uses = {
        "weights": dataclasses.replace(model, params=model.params | {"layers": last_layer_changed}),
        "cache": lsjax.load(model.path, cache="int8"),
        "kernels": lsjax.load(model.path, kernels="off"),
    }
    for key, other in uses.items():
        assert [name for name, value in describe_use(other).items() if value != here[name]] == [key]
    assert describe_use(lsjax.quantize(model))["dtype"] == "int8"
    assert describe_use(lsjax.load(model.path, for_decoding=True)) == here
    (Path(model.path) / "draft_vocabulary.json").write_text('{"ids": [3, 1, 2]}')
    assert describe_use(model)["draft_vocabulary"] is not None


ROW = {"temperature": 0, "batch_size": 1, "exit_layer": 1, "num_speculations": 1, "draft_vocabulary": None}
ROW |= {"predicted_speedup": 1.5, "draft_weights": None}


@pytest.mark.parametrize(
    "change",
    [
        "cut", "empty", "a list", "no settings", "another format", {"exit_layer": 9}, {"exit_layer": None},
        {"num_speculations": 0}, {"num_speculations": 1.5}, {"num_speculations": 99}, {"temperature": "hot"},
        {"temperature": -1}, {"batch_size": 0}, {"batch_size": True}, {"draft_vocabulary": [1]}, {"more": 1},
        {"draft_weights": "int4"}, {"draft_weights": []},
        {"draft_weights": "int8", "exit_layer": None, "num_speculations": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_table_is_not_used(model, measurements, caplog, change):
    path = keep(model, (0.0, 1, 1, 1))
    content = json.loads(path.read_text())
    assert content["settings"] == [ROW | {"predicted_speedup": 1.1}]
    texts = {
        "cut": path.read_text()[:-20],
        "empty": "",
        "a list": "[]",
        "no settings": json.dumps(content | {"settings": []}),
    }
    texts["another format"] = json.dumps(content | {"format": 3})
    if isinstance(change, dict):
        path.write_text(json.dumps(content | {"settings": [ROW | change]}))
    else:
        path.write_text(texts[change])
    assert str(path) in line_of_measuring(model, measurements, caplog)


def test_a_table_does_not_answer_half_of_the_question(model, measurements, caplog):
    path = keep(model, (0.0, 1, 1, 1))
    lsjax.generate(model, PROMPTS, 4, lsjax.SelfSpeculative("auto", 2))
    assert measurements == ["measured"]
    assert messages(caplog) == [
        f'"auto" measures, at every call: {path} is for "auto" of both exit_layer and num_speculations alone'
    ]


def test_a_model_without_a_table_says_nothing(model, measurements, caplog):
    lsjax.generate(model, PROMPTS, 4, AUTO)
    assert measurements == ["measured"]
    assert not messages(caplog)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "not loaded from files, so there is no folder for its tuned settings"),
        ("some/model", "some/model is a name on the Hub: give the path of a copy of the model"),
        ("/proc/1", "cannot write the tuned settings in /proc/1: "),
        ("/nowhere/a.gguf", "cannot write the tuned settings /nowhere/a.gguf.tuned_settings.json: its folder does not"),
    ],
)
def test_nothing_is_measured_for_a_table_that_cannot_be_kept(model, decodings, path, message):
    with pytest.raises(lsjax.UserError, match=message.replace(".", r"\.")):
        lsjax.tune_table(dataclasses.replace(model, path=path), PROMPTS, 4)
    assert not decodings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperatures": ()}, "temperatures must be a list of at least one value"),
        ({"temperatures": 0.8}, "temperatures must be a list"),
        ({"temperatures": (0.0, -1)}, "temperature must be 0 .greedy. or in"),
        ({"temperatures": ([0.0, 1.0],)}, "temperature must be one value for all prompts"),
        ({"batch_sizes": (1, 0)}, "batch_size must be at least 1"),
        ({"batch_sizes": (None,)}, "batch_size must be a whole number"),
        ({"batch_sizes": "18"}, "batch_sizes must be a list"),
        ({"batch_sizes": (1, 10**9)}, "batch_size must be in"),
        ({"prompts": [[5], []], "batch_sizes": (2,)}, "prompt 1 is empty"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(model, decodings, arguments, message):
    with pytest.raises(lsjax.UserError, match=message):
        lsjax.tune_table(model, **({"prompts": PROMPTS, "max_new_tokens": 4} | arguments))
    assert not decodings
    assert not (Path(model.path) / FILE).exists()


def test_the_command_keeps_a_table_that_generate_uses(model, decodings, capsys, caplog):
    caplog.set_level(logging.WARNING)
    given = [f"--model={model.path}", "--prompt=the cat", "--max_new_tokens=4"]
    assert main(["tune", *given, "--temperatures=0", "--batch_sizes=1"]) == 0
    (setting,) = read_settings(Path(model.path) / FILE, 3).settings
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [str(setting), f"table: {Path(model.path) / FILE}"]
    decodings.clear()
    assert main(["generate", *given, "--exit_layer=auto", "--num_speculations=auto"]) == 0
    assert not decodings
    assert (setting.strategy.name in capsys.readouterr().out) or "autoregressive" in str(setting)
    for wrong, message in (("--temperatures=hot", "--temperatures must be numbers"), ("--chat", "chat template")):
        assert main(["tune", *given, wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
