"""Whole runs with LoRA: exact resumption, small checkpoints, the base found again, and the model handed on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lsjax
from lsjax.cli.main import main
from lsjax.config import MeshConfig
from lsjax.io.checkpoints import finished_steps, load_stored
from lsjax.io.convert import convert
from lsjax.training.loop import train
from tests import conftest
from tests.helpers.recorded import RECORDED, copy_of, edit_tensors
from tests.helpers.runs import continuing, replace

pytestmark = pytest.mark.usefixtures("compilation_cache")


def lora_config(text_folder, base):
    """Returns a run of four steps, with dropout and exits, that adapts attention and the head of llama31."""
    config = continuing(conftest.tiny_run.__wrapped__(text_folder), base)
    return replace(
        config,
        layerskip={"dropout_max_rate": 0.2},
        training={"lora_rank": 2, "lora_targets": "layers/attention,lm_head", "learning_rate": 0.01},
        checkpoint={"every_steps": 2},
    )


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """Returns a finished run, its config and its result."""
    folder = tmp_path_factory.mktemp("finished")
    config = lora_config(text_folder, copy_of("llama31", folder / "base"))
    return config, folder / "run", train(config, folder / "run", verbose=False)


@pytest.fixture
def copied(finished, tmp_path):
    """Returns the config, and a copy of the workdir as it was after step 2."""
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    return config, tmp_path / "run"


def test_checkpoints_hold_the_adapter_alone(finished):
    _, workdir, _ = finished
    step, stored = load_stored(workdir)
    assert step == 4
    assert sorted("/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)) == [
        f"{matrix}/{side}"
        for matrix in ("layers/attention/output", "layers/attention/qkv", "lm_head")
        for side in ("lora_a", "lora_b")
    ]
    base = json.loads((workdir / "base_model.json").read_text())
    assert base["path"] == str(workdir.parent / "base")


def test_the_workdir_is_the_merged_model(finished, tmp_path):
    config, workdir, result = finished
    model = lsjax.load(workdir)
    assert (model.step, model.config) == (4, config.model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), model.params, result.params)
    base = lsjax.load(config.initial_model)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), model.params, base.params)
    assert min(moved["lm_head"], *moved["layers"]["attention"].values()) > 1e-3
    assert max(moved["embed"], moved["final_norm"]["scale"], *moved["layers"]["feed_forward"].values()) == 0
    for form in ("huggingface", "lsjax", "peft"):
        convert(workdir, tmp_path / form, form)
    for again in (
        lsjax.load(tmp_path / "huggingface"),
        lsjax.load(tmp_path / "lsjax"),
        lsjax.load(config.initial_model, adapter=tmp_path / "peft"),
        lsjax.load(config.initial_model, adapter=workdir),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again.params, model.params)
    peft = sum(path.stat().st_size for path in (tmp_path / "peft").iterdir())
    assert peft < 0.6 * (tmp_path / "huggingface" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("mesh", [MeshConfig(), pytest.param(MeshConfig(2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(finished, copied, mesh):
    _, workdir, _ = finished
    config, resumed = copied
    train(dataclasses.replace(config, mesh=mesh), resumed, verbose=False)
    ours, theirs = load_stored(resumed)[1], load_stored(workdir)[1]
    exact = mesh == MeshConfig()
    jax.tree.map(np.testing.assert_array_equal if exact else close, ours, theirs)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_another_base_is_refused_everywhere(finished, copied, tmp_path):
    config, workdir = copied
    base, away = finished[1].parent / "base", tmp_path / "away"
    base.rename(away)
    try:
        copy_of("llama31", base)
        edit_tensors(base, lambda tensors: tensors.update({"model.norm.weight": 2 * tensors["model.norm.weight"]}))
        for attempt in (
            lambda: train(config, workdir, verbose=False),
            lambda: lsjax.load(workdir),
            lambda: lsjax.load(base, adapter=workdir),
            lambda: convert(workdir, tmp_path / "out", "peft"),
        ):
            with pytest.raises(lsjax.UserError, match=r"base is not the base model of the adapter in .*run"):
                attempt()
    finally:
        shutil.rmtree(base)
        away.rename(base)
    assert finished_steps(workdir / "checkpoints") == [2]
    assert not (tmp_path / "out").exists()


def test_a_base_that_moved_is_found_when_it_is_named(copied, tmp_path):
    _, workdir = copied
    base = json.loads((workdir / "base_model.json").read_text())
    (workdir / "base_model.json").write_text(json.dumps(base | {"path": str(tmp_path / "gone")}))
    with pytest.raises(
        lsjax.UserError, match=r"its base model cannot be opened .* give that path, and .* as the adapter"
    ):
        lsjax.load(workdir)
    elsewhere = copy_of("llama31", tmp_path / "elsewhere")
    assert lsjax.load(elsewhere, adapter=workdir).step == 2
    convert(elsewhere, tmp_path / "peft", "peft", adapter=workdir)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(elsewhere)


def test_a_run_resumes_from_a_base_that_moved_and_remembers_where_it_is(finished, copied, tmp_path):
    config, workdir = copied
    base, elsewhere = finished[1].parent / "base", tmp_path / "elsewhere"
    base.rename(elsewhere)
    try:
        with pytest.raises(lsjax.UserError, match=r"no model at .*base: it does not exist"):
            train(config, workdir, verbose=False)
        train(dataclasses.replace(config, initial_model=str(elsewhere)), workdir, verbose=False)
        assert lsjax.load(workdir).step == 4
        assert json.loads((workdir / "config.json").read_text())["initial_model"] == str(elsewhere)
    finally:
        elsewhere.rename(base)
    jax.tree.map(np.testing.assert_array_equal, load_stored(workdir)[1], load_stored(finished[1])[1])
    changes = json.loads((workdir / "changes.jsonl").read_text())
    assert changes == {"step": 2, "changes": {"config.initial_model": [config.initial_model, str(elsewhere)]}}


@pytest.mark.parametrize("other", ["weights", "tokenizer"])
def test_a_run_resumes_from_no_other_base(copied, tmp_path, other):
    config, workdir = copied
    elsewhere = copy_of("llama31", tmp_path / "elsewhere")
    if other == "weights":
        edit_tensors(elsewhere, lambda tensors: tensors.update({"model.norm.weight": 2 * tensors["model.norm.weight"]}))
        message = r"elsewhere is not the base model of the adapter in .*run"
    else:
        tokenizer = json.loads((elsewhere / "tokenizer.json").read_text())
        tokenizer["model"]["merges"].reverse()
        (elsewhere / "tokenizer.json").write_text(json.dumps(tokenizer))
        message = "holds data packed for"
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(lsjax.UserError, match=message):
        train(dataclasses.replace(config, initial_model=str(elsewhere)), workdir, verbose=False)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_run_without_lora_does_not_change_its_initial_model(text_folder, tmp_path):
    base, elsewhere = (copy_of("llama31", tmp_path / name) for name in ("base", "elsewhere"))
    config = continuing(conftest.tiny_run.__wrapped__(text_folder), base)
    config = replace(config, training={"total_steps": 2})
    train(config, tmp_path / "run", verbose=False)
    with pytest.raises(lsjax.UserError, match=r"holds another run: config\.initial_model was"):
        train(dataclasses.replace(config, initial_model=str(elsewhere)), tmp_path / "run", verbose=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"initial_model": ""}, r"config\.training\.lora_rank needs config\.initial_model"),
        ({"training": {"lora_targets": "q_proj"}}, "lora_targets: 'q_proj' is no matrix"),
        ({"training": {"lora_rank": -1}}, "lora_rank must not be negative"),
        ({"training": {"lora_alpha": 0.0}}, "lora_alpha must be positive"),
    ],
    ids=str,
)
def test_a_refused_run_leaves_nothing(text_folder, tmp_path, keys, message):
    config = replace(lora_config(text_folder, RECORDED / "llama31"), training=keys.get("training", {}))
    config = dataclasses.replace(config, initial_model=keys.get("initial_model", config.initial_model))
    with pytest.raises(lsjax.UserError, match=message):
        train(config, tmp_path / "run", verbose=False)
    assert not (tmp_path / "run").exists()


def test_a_run_with_lora_is_no_base_of_another(finished, text_folder, tmp_path):
    config, workdir, result = finished
    again = dataclasses.replace(config, initial_model=str(workdir))
    with pytest.raises(lsjax.UserError, match=r"is a run with LoRA itself.*convert it first"):
        train(again, tmp_path / "run", verbose=False)
    with pytest.raises(lsjax.UserError, match="is a run with LoRA: give its base model"):
        lsjax.load(workdir, adapter=workdir)
    full = replace(again, training={"lora_rank": 0, "total_steps": 2, "learning_rate": 1e-9, "weight_decay": 0.0})
    started = train(full, tmp_path / "full", verbose=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), started.params, result.params)


def test_commands_take_an_adapter(finished, tmp_path, capsys):
    config, workdir, _ = finished
    assert not main(["convert", f"--from={workdir}", f"--to={tmp_path / 'peft'}", "--format=peft"])
    # qkv [32, 64], output [32, 32] and the head [32, 288], of rank 2
    assert f"{2 * (3 * (32 + 64 + 32 + 32) + 32 + 288):,} parameters" in capsys.readouterr().out
    flags = ["--prompt=def", "--max_new_tokens=8"]
    texts = []
    for model in ([f"--model={workdir}"], [f"--model={config.initial_model}", f"--adapter={tmp_path / 'peft'}"]):
        assert not main(["generate", *model, *flags])
        texts.append(capsys.readouterr().out.rpartition(" tokens, ")[0])  # without the time that it took
    assert texts[0] == texts[1] != ""
    report = tmp_path / "report.json"
    decode = ["decode", f"--model={config.initial_model}", f"--adapter={workdir}", f"--report={report}", *flags]
    assert not main([*decode, "--strategies=autoregressive"])
    assert json.loads(report.read_text())["adapter"] == str(workdir)
