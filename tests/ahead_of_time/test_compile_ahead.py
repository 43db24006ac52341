"""Programs compiled for TPUs and GPUs that are not there: `make test-ahead` installs the compilers."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import lsjax
from lsjax.aot import compile_only, hlo
from lsjax.aot.collectives import collectives
from lsjax.aot.programs import compile_ahead, decode_programs, evaluation_program, train_program
from lsjax.aot.report import describe, summary_line
from lsjax.aot.search import search
from lsjax.config import Config
from lsjax.costs.hardware import parse_topology
from lsjax.model.transformer import count_params, init_params

compile_only.prepare()
pytest.importorskip("libtpu", reason="make test-ahead installs it")

ROOT = Path(__file__).parent.parent.parent
# The paper's narrowest run, largest vocabulary, tightest fit, fewest GPUs, and a stress case.
PAPER = ("pretrain_1_5b", "continual_llama3_8b", "continual_llama2_13b", "finetune_topv2_1_5b", "pretrain_70b")


def read_config(name: str) -> Config:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Config.from_dict(module.get_config().to_dict())


def compiled_for(name: str) -> list[str]:
    """Returns the lines of a configuration's docstring that say what it was compiled for."""
    lines = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1].splitlines()
    return [line.strip() for line in lines if line.strip().startswith(("gpu:", "tpu:"))]


def shallow(name="pretrain_7b", **sections) -> Config:
    """Returns the configuration at full width with few layers, which compiles in seconds."""
    config = read_config(name)
    sections = {"model": {"num_layers": 4}, "layerskip": {"exit_rotation": 2}} | sections
    return dataclasses.replace(
        config, **{key: dataclasses.replace(getattr(config, key), **values) for key, values in sections.items()}
    )


def report_of(config, topology, make=train_program):
    program = make(config, parse_topology(topology))
    result = compile_ahead(program)
    return describe(config, parse_topology(topology), program, result), program, result


@pytest.fixture(scope="module")
def on_h100():
    config = shallow()
    return config, *report_of(config, "gpu:h100:8x8")


def test_a_gpu_step_gathers_weights_and_reduces_gradients_and_nothing_else(on_h100):
    """Checks every collective of a step with fsdp=16, data=4.

    Weights of a layer are gathered twice (forward and backward), the embedding once, the head once for the last exit
    and twice per early exit. Every gradient is reduced once.
    """
    config, report, _, result = on_h100
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config.model))
    layers = 2 * sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2)
    head = 2 * params["embed"].size
    early = 1.5  # mean number of early exits per step: 2, 1, 2, 1, ... of layers 0..2
    gathered = 2 * layers + head * (1 + 1 + 2 * early)
    assert report["collectives"]["all-gather"]["bytes"] == pytest.approx(gathered, rel=0.005)
    reduced = layers + head * (1 + 1 + early)
    scattered = report["collectives"]["reduce-scatter"]["bytes"]
    assert scattered == pytest.approx(reduced, rel=0.005)
    # The 4 replicas sum what remains: a sixteenth of the gradients, and scalars.
    assert report["collectives"]["all-reduce"]["bytes"] == pytest.approx(reduced / 16, rel=0.05)
    largest = max(c.payload for c in collectives(hlo.parse(result.text), 64))
    assert largest <= layers / 4 + 2 * head


def test_state_is_donated_and_memory_adds_up(on_h100):
    config, report, _, result = on_h100
    memory, m = report["memory"], result.memory
    exact = count_params(config.model) * 4 / 16
    assert memory["parameters"] == pytest.approx(exact, rel=1e-3)
    assert memory["optimizer"] == pytest.approx(2 * exact, rel=1e-3)
    assert m.alias_size_in_bytes >= memory["parameters"] + memory["optimizer"]
    kinds = sum(size for kind, size in memory.items() if kind not in ("total", "available", "margin"))
    assert memory["total"] == pytest.approx(kinds, rel=1e-3)
    # Policy "elementwise" keeps qkv (3 D), attention and its output (2 D), the input (D), gate and up (2 F): bfloat16,
    # 2 sequences.
    c, tokens = config.model, config.training.batch_size // 64 * 4096
    by_hand = c.num_layers * tokens * (6 * c.width + 2 * c.feed_forward_width) * 2
    assert memory["activations"] == pytest.approx(by_hand, rel=1e-3)
    assert m.temp_size_in_bytes > by_hand
    assert report["fits"]
    assert json.dumps(report)


@pytest.mark.parametrize("topology", ["gpu:h100:1x8", "tpu:v5e:2x4"])
def test_four_exits_need_little_more_memory_than_one(topology):
    """Compares temporary memory of a step with an exit after each of four layers and of one with the last exit only."""
    temporaries = {}
    for curriculum in ("none", "all"):
        config = shallow(
            "pretrain_1_5b",
            layerskip={"exit_curriculum": curriculum},
            training={"batch_size": 8, "sequence_length": 1024, "loss_chunk": 1024},
        )
        _, _, result = report_of(config, topology)
        temporaries[curriculum] = result.memory.temp_size_in_bytes
    assert temporaries["all"] < 1.3 * temporaries["none"]


def test_the_bound_is_that_of_the_slowest_part(on_h100):
    _, report, *_ = on_h100
    r = report["roofline"]
    slowest = max(r[f"{part}_seconds"] for part in ("matmul", "memory", "interconnect"))
    assert r["seconds"] == slowest
    tokens = 128 * 4096 / 64
    assert r["matmul_seconds"] == pytest.approx(report["flops_per_token"]["executed"] * tokens / 989e12)
    assert r["mfu_bound"] == pytest.approx(report["flops_per_token"]["model"] * tokens / 989e12 / slowest)
    assert r["mfu_bound_causal_without_overlap"] < r["mfu_bound_causal"]


def test_evaluation_between_steps(on_h100):
    config, *_ = on_h100
    report, *_ = report_of(config, "gpu:h100:8x8", evaluation_program)
    assert report["fits"]
    assert report["memory"]["optimizer, waiting"] == pytest.approx(2 * count_params(config.model) * 4 / 16, rel=1e-3)
    weights = count_params(config.model) * 2
    assert report["collectives"]["all-gather"]["bytes"] == pytest.approx(weights, rel=0.01)  # each once, in bfloat16


def test_a_tpu_step_uses_splash_attention_and_sends_each_weight_seldom():
    """Checks every collective of a TPU step with fsdp=8.

    XLA:TPU cuts the layers' matmuls into pieces and passes weights and gradients around between them. It gathers the
    embedding once, the head once for the last exit and twice for the early exit, which is active at every second step.
    """
    config = shallow("pretrain_1_5b", model={"num_layers": 2}, training={"batch_size": 16})
    report, _, result = report_of(config, "tpu:v5e:2x4")
    assert report["fits"], summary_line(report)
    assert "splash" in report["execution"]
    assert "splash_mqa" in result.text
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config.model))
    layers = 2 * sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2)
    head = 2 * params["embed"].size
    sent = {kind: counts["bytes"] for kind, counts in report["collectives"].items()}
    assert sent["all-gather"] == pytest.approx(head * (1 + 1 + 2 * 0.5), rel=0.005)
    assert sent["reduce-scatter"] == pytest.approx(head * (1 + 1 + 0.5), rel=0.005)
    assert layers < sent["collective-permute"] < 3 * layers * 7 / 8
    assert result.memory.alias_size_in_bytes >= report["memory"]["parameters"] + report["memory"]["optimizer"]


def test_a_configuration_says_what_the_compiler_says():
    line = next(line for line in compiled_for("pretrain_1_5b") if line.startswith("tpu:"))
    report, *_ = report_of(read_config("pretrain_1_5b"), line.split()[0])
    assert summary_line(report) == line


@pytest.mark.parametrize("name", PAPER)
def test_runs_of_the_paper_fit_their_gpus(name):
    """Compiles with the attention that is available. Figures in docstrings use cuDNN's, which needs less memory."""
    lines = [line for line in compiled_for(name) if line.startswith("gpu:")]
    assert lines
    report, *_ = report_of(read_config(name), lines[0].split()[0])
    assert report["fits"], summary_line(report)
    assert "roofline" in report


@pytest.mark.parametrize("strategy", [lsjax.Autoregressive(), lsjax.SelfSpeculative(1, 4)], ids=lambda s: s.name)
def test_a_decoding_loop_holds_weights_and_caches_once(strategy):
    config = shallow(mesh={"tensor": 8})
    report, result = {}, {}
    for program in decode_programs(config, parse_topology("gpu:h100:1x8"), strategy, 2, 512, 256):
        result[program.name] = compile_ahead(program)
        report[program.name] = describe(config, parse_topology("gpu:h100:1x8"), program, result[program.name])
    loop, memory = report[strategy.name], result[strategy.name].memory
    weights = 2 * (count_params(config.model) - 9 * 4096) / 8 + 2 * 9 * 4096
    assert loop["memory"]["parameters"] == pytest.approx(weights, rel=1e-3)
    cache = 2 * 4 * 2 * 4 * (512 + 256 + 64) * 128 * 2  # k and v, L, B, K / 8, C, H, bfloat16
    assert loop["memory"]["caches"] == cache
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.1 * weights
    # A round reads all weights once. With drafts it reads the drafting layer d + 1 times, and the head d more times.
    drafting = 1 if strategy.name == "autoregressive" else 4
    traffic = loop["roofline"]["memory_traffic"]
    assert 0.9 * weights < traffic < (1 + drafting) * weights + 4 * cache


ADAPTER = {"exit_adapter": "linear", "draft_exit": 2, "dropout_max_rate": 0.0, "exit_curriculum": "none"}
LORA = {"lora_rank": 8, "lora_targets": "layers"}


def small(**sections):
    """Returns a run of four narrow layers on eight devices; no matrix of the model has the shape of an adapter's."""
    shape = {"width": 512, "num_heads": 4, "num_kv_heads": 4, "feed_forward_width": 1024, "vocab_size": 4096}
    sections.setdefault("layerskip", {"exit_curriculum": "none", "dropout_max_rate": 0.0})
    training = {"batch_size": 8, "sequence_length": 64, "gradient_accumulation": 1} | sections.pop("training", {})
    return shallow(model={"num_layers": 4} | shape, mesh={"data": 1, "fsdp": -1}, training=training, **sections)


@pytest.mark.parametrize("make", [train_program, evaluation_program])
@pytest.mark.parametrize("sections", [{}, {"layerskip": ADAPTER}, {"training": LORA}], ids=["full", "adapter", "LoRA"])
def test_the_compiler_counts_the_same_inputs(sections, make):
    """The program of a run holds all that the run trains, and what it stands on; the count names all of it."""
    _, program, result = report_of(small(**sections), "gpu:h100:1x8", make)
    inputs = sum(size for kind, size in program.input_bytes.items() if kind != "optimizer, waiting")
    assert result.memory.argument_size_in_bytes == pytest.approx(inputs, rel=2e-3)


def test_an_evaluation_reads_the_exit_of_an_adapter_through_it():
    plain, adapted = small(evaluation={"exit_stride": 3}), small(layerskip=ADAPTER, evaluation={"exit_stride": 3})
    without, through = (evaluation_program(config, parse_topology("gpu:h100:1x8")) for config in (plain, adapted))
    more = through.flops["executed"] - without.flops["executed"]
    assert more == 2 * 512 * 4096 + 2 * 512**2  # one more exit, and the adapter's product
    arguments = [compile_ahead(program).memory.argument_size_in_bytes for program in (without, through)]
    assert arguments[1] - arguments[0] == pytest.approx(4 * 512**2, abs=1024)


@pytest.mark.parametrize(
    ("strategy", "drafted"),
    [(lsjax.EarlyExit(2), 1), (lsjax.SelfSpeculative(2, 3), 3), (lsjax.SelfSpeculative(1, 3), 0)],
    ids=str,
)
def test_decoding_at_the_exit_of_an_adapter_goes_through_it(strategy, drafted):
    loops = []
    for config in (small(), small(layerskip=ADAPTER)):
        (_, loop) = decode_programs(config, parse_topology("gpu:h100:1x8"), strategy, 1, 64, 64)
        loops.append((loop, compile_ahead(loop).memory.argument_size_in_bytes))
    (plain, plain_bytes), (adapted, adapted_bytes) = loops
    kernel = 2 * 512**2 if drafted else 0  # in bfloat16, and as FLOPs
    assert adapted_bytes - plain_bytes == adapted.input_bytes["parameters"] - plain.input_bytes["parameters"] == kernel
    assert adapted.flops["executed"] - plain.flops["executed"] == drafted * kernel


@pytest.mark.slow
def test_search_ends_at_what_does_not_fit():
    # Short sequences, since XLA:GPU without cuDNN takes half a minute per trial for long ones.
    config = shallow(
        model={"num_layers": 64}, layerskip={"exit_curriculum": "none"}, training={"sequence_length": 1024}
    )
    lines = []
    best = search(config, parse_topology("gpu:a100-40:1x16"), lines.append)
    assert best["fits"]
    assert best["trials"] == lines
    assert best["setting"]["config.training.batch_size"] >= 16
    assert any("does not fit" in line for line in lines)
    speeds = [float(line.rsplit(" ", 1)[1].rstrip("%")) for line in lines if ": fits" in line]
    found = 100 * best["roofline"]["mfu_bound_causal_without_overlap"]
    assert found == pytest.approx(max(speeds), abs=0.06)
    assert "gains less" in best["why_not_more"] or "does not fit" in best["why_not_more"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "compile_ahead.py", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )


def test_what_does_not_fit_is_status_1_and_names_the_largest(tmp_path):
    done = command(
        "--config=configs/pretrain_70b.py",
        "--config.mesh.fsdp=-1",
        "--config.mesh.data=1",
        "--topology=gpu:h100:8",
        f"--report={tmp_path / 'report.json'}",
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert "gpu:h100:1x8 train: does not fit" in done.stdout
    assert "(largest: activations " in done.stdout
    (report,) = json.loads((tmp_path / "report.json").read_text())["programs"]
    assert not report["fits"]
    assert report["memory"]["optimizer"] > 60 * 2**30  # 70e9 x 8 bytes over 8 devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=tpu:v5e:3x5"], "cannot describe --topology=tpu:v5e:3x5"),
        (
            ["--topology=gpu:h100:8", "--config.mesh.tensor=3"],
            "(data=-1, fsdp=16, tensor=3) does not fit 8",
        ),
        (["--topology=gpu:h100:8x8", "--config.training.batch_size=30"], "a microbatch is 30 sequences"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message):
    done = command("--config=configs/pretrain_7b.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
