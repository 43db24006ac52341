"""Runs that train an exit's adapter on a model that stays as it is."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lsjax
from lsjax.config import Config, MeshConfig
from lsjax.io.convert import convert
from lsjax.parallel.sharding import make_mesh
from lsjax.training.step import init_state, make_train_step, state_shardings
from tests.helpers.recorded import RECORDED
from tests.helpers.runs import continuing, make_batch, replace

BASE = RECORDED / "llama32"
EXIT = 1
ADAPTED = {
    "dropout_max_rate": 0.0,
    "exit_curriculum": "none",
    "draft_exit": EXIT,
    "exit_adapter": "linear",
    "exit_token_stride": 2,
}


def adapting(tiny_run, path=BASE, **training):
    config = replace(continuing(tiny_run, path), layerskip=ADAPTED)
    settings = {"total_steps": 6, "learning_rate": 0.02, "weight_decay": 0.0} | training
    return replace(config, training=settings, checkpoint={"every_steps": 3}, evaluation={"exit_stride": 3})


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    from tests import conftest

    config = adapting(conftest.tiny_run.__wrapped__(text_folder))
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    return config, workdir, lsjax.train(config, workdir, verbose=False)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_adapter_learns_and_the_model_stays_bit_for_bit(finished):
    _, workdir, result = finished
    base, run = lsjax.load(BASE), lsjax.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, run.params, base.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), base.params)
    assert base.exit_adapter is None
    assert run.exit_adapter.exit_layer == EXIT
    assert np.any(run.exit_adapter.kernel)
    rows = read_lines(workdir / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert [sorted(row["exit_losses"]) for row in rows] == [["1", "3"]] * 6
    evaluation = read_lines(workdir / "evaluations.jsonl")[-1]
    assert set(evaluation["loss"]) == {"1", "3"}  # the stride alone would leave exit 1 out
    assert evaluation["loss"]["1"] == pytest.approx(result.profile.at(EXIT)[0])


def test_a_resumed_run_gives_the_same_adapter(finished, tmp_path):
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    lsjax.train(config, tmp_path / "run", verbose=False)
    kernels = [lsjax.load(path).exit_adapter.kernel for path in (workdir, tmp_path / "run")]
    np.testing.assert_array_equal(*kernels)


def test_a_converted_run_is_the_base_and_one_small_file(finished, tmp_path):
    _, workdir, _ = finished
    convert(workdir, tmp_path / "run", "huggingface", "stored")
    convert(BASE, tmp_path / "base", "huggingface", "float32")
    ours, theirs = ({path.name for path in (tmp_path / name).iterdir()} for name in ("run", "base"))
    assert ours - theirs == {"exit_adapter.safetensors"}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "base")]
    assert weights[0] == weights[1]
    model, run = lsjax.load(tmp_path / "run"), lsjax.load(workdir)
    np.testing.assert_array_equal(model.exit_adapter.kernel, run.exit_adapter.kernel)
    prompts = [[5, 9, 2], [7] * 9]
    drafted = lsjax.generate(model, prompts, 16, lsjax.SelfSpeculative(EXIT, 2))
    assert drafted.tokens == lsjax.generate(lsjax.load(BASE), prompts, 16).tokens


def test_a_run_goes_on_from_the_adapter_of_its_initial_model(finished, tiny_run, tmp_path):
    _, workdir, _ = finished
    config = adapting(tiny_run, workdir, total_steps=1, learning_rate=1e-9, warmup_steps=0)
    lsjax.train(config, tmp_path / "run", verbose=False)
    kernels = [lsjax.load(path).exit_adapter.kernel for path in (workdir, tmp_path / "run")]
    np.testing.assert_allclose(*kernels, atol=1e-7)


def run_steps(config, mesh_config, devices=None, steps=3):
    def init():
        state = init_state(config)
        return state._replace(params=jax.tree.map(lambda a: 3 * a, state.params))  # fresh ones: all exits say the same

    mesh = make_mesh(mesh_config, devices)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=state_shardings(config, mesh))()
        step, found = make_train_step(config, mesh), []
        for index in range(steps):
            state, metrics = step(state, make_batch(config, index))
            found.append(jax.device_get((metrics.loss, metrics.gradient_norm, metrics.exit_losses)))
    return state, found, step


def test_the_optimizer_knows_the_adapter_alone(tiny_run):
    config = replace(dataclasses.replace(tiny_run, initial_model="some/model"), layerskip=ADAPTED)
    state, _, step = run_steps(config, MeshConfig(1, 1, 1), jax.devices()[:1])
    moments = [leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert moments == [(32, 32)] * 2
    assert step._cache_size() == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_a_mesh_and_microbatches_give_the_losses_of_one_device(tiny_run, parts):
    config = replace(dataclasses.replace(tiny_run, initial_model="some/model"), layerskip=ADAPTED)
    alone = run_steps(config, MeshConfig(1, 1, 1), jax.devices()[:1])[1]
    config = replace(config, training={"gradient_accumulation": parts})
    for ours, theirs in zip(run_steps(config, MeshConfig(2, 2, 2))[1], alone, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, theirs)


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        ("layerskip", {"draft_exit": 0}, "needs the exit it adapts: set draft_exit"),
        ("layerskip", {"dropout_max_rate": 0.1}, "config.layerskip.dropout_max_rate must be 0.0, got 0.1"),
        ("layerskip", {"exit_curriculum": "all"}, "config.layerskip.exit_curriculum must be 'none'"),
        ("layerskip", {"exit_distillation": 1.0}, "config.layerskip.exit_distillation must be 0.0"),
        ("training", {"frozen": "embed"}, "config.training.frozen must be ''"),
        ("training", {"z_loss": 0.1}, "config.training.z_loss must be 0.0"),
        ("training", {"lora_rank": 2}, "config.training.lora_rank must be 0, got 2"),
        ("layerskip", {"exit_adapter": "block"}, "exit_adapter is 'block'; choose one of none, linear"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_contradicts_an_adapter_is_named(tiny_run, section, keys, said):
    config = replace(replace(dataclasses.replace(tiny_run, initial_model="some/model"), layerskip=ADAPTED))
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(lsjax.UserError, match=said):
        Config.from_dict(replace(config, **{section: keys}).to_dict())
    with pytest.raises(lsjax.UserError, match="needs the model it adapts: set initial_model"):
        Config.from_dict(dataclasses.replace(config, initial_model="").to_dict())
