"""The commands as a user calls them: what they print and leave, and one clear line and exit status 2 on bad input.

They run in this process, where a case takes a tenth of a second; a few run as processes of their own.
"""

import contextlib
import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lsjax.cli.main import COMMANDS, run_command
from lsjax.training.loop import train
from tests.conftest import process_environment

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "io" / "recorded"


def run(script, *arguments):
    """Runs a command in this process, as launch/`script` would."""
    name, out, err = script.removesuffix(".py"), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        status = run_command(name, [str(a) for a in arguments], program=script, call=f"python launch/{script}")
    return subprocess.CompletedProcess(script, status, out.getvalue(), err.getvalue())


def run_process(script, *arguments, **environment):
    """Runs launch/`script` as a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=process_environment(**environment), check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workdir(text_folder, tmp_path_factory):
    from tests import conftest

    workdir = tmp_path_factory.mktemp("run")
    train(conftest.tiny_run.__wrapped__(text_folder), workdir, verbose=False)
    return workdir


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


TRAIN = ["--config=configs/scratch.py", "--workdir={tmp}/w"]
BAD_TRAINING = {
    "nothing": ([], "--workdir"),
    "missing config file": (["--config=configs/nope.py", "--workdir={tmp}/w"], "configs/nope.py"),
    "no workdir": (["--config=configs/scratch.py"], "--workdir"),
    "unknown key": ([*TRAIN, "--config.model.widht=3"], "width"),
    "wrong type": ([*TRAIN, "--config.model.width=abc"], "--config.model.width=abc"),
    "unknown flag": ([*TRAIN, "--frobnicate=1"], "frobnicate"),
    "stray argument": ([*TRAIN, "extra"], "extra"),
    "bad choice": ([*TRAIN, "--config.layerskip.exit_curriculum=some"], "rotational"),
    "draft exit too deep": ([*TRAIN, "--config.layerskip.draft_exit=12"], "config.model.num_layers (12)"),
    "impossible shape": ([*TRAIN, "--config.model.num_kv_heads=5"], "num_kv_heads"),
    "sequence over context": ([*TRAIN, "--config.training.sequence_length=100000"], "context_length"),
    "no corpus": ([*TRAIN, "--config.data.corpus={tmp}/nothing"], "config.data.corpus"),
    "empty corpus": ([*TRAIN, "--config.data.corpus={empty}"], "is empty"),
    "unwritable workdir": (["--config=configs/scratch.py", "--workdir=/proc/nope/w"], "cannot write workdir"),
    "broken config file": (["--config={tmp}/broken.py", "--workdir={tmp}/w"], "name 'undefined' is not defined"),
    "wrong key in a config file": (["--config={tmp}/wrong.py", "--workdir={tmp}/w"], "widht"),
    "negative seed": ([*TRAIN, "--config.training.seed=-1"], "config.training.seed must not be negative"),
    "mesh over a width": ([*TRAIN, "--config.mesh.data=1", "--config.mesh.tensor=2"], "does not fit {devices} device"),
    "data folder of something else": ([*TRAIN, "--config.data.directory={full}"], "holds something else"),
    "mesh": ([*TRAIN, "--config.mesh.data=7"], "does not fit {devices} device"),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_input(name, tmp_path, empty):
    arguments, message = BAD_TRAINING[name]
    (tmp_path / "broken.py").write_text("get_config = undefined")
    (tmp_path / "wrong.py").write_text(
        "from lsjax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.model.widht = 3\n    return config\n"
    )
    result = run("train.py", *(a.format(tmp=tmp_path, empty=empty, full=ROOT / "tests") for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message.format(devices=jax.device_count()) in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not list(tmp_path.glob("w/*"))  # nothing half-written, and the next try may use the folder


BAD_DECODING = {
    "no model": (["--prompt=x"], "--model"),
    "missing model": (["--model={tmp}/nope"], "does not exist"),
    "not a workdir": (["--model={tmp}"], "config.json"),
    "exit layer": (["--model={run}", "--exit_layer=5"], "exit_layer 5 is out of range: this model has layers 1..4"),
    "exit layer zero": (["--model={run}", "--exit_layer=0"], "exit_layer 0 is out of range"),
    "drafts": (["--model={run}", "--num_speculations=0"], "num_speculations 0"),
    "empty prompt": (
        ["--model={smollm2}", "--prompt="],
        "prompt 0 is empty, and this tokenizer has no token that opens",
    ),
    "prompt over context": (["--model={run}", "--prompt=" + "x = 1\n" * 400], "context of 128"),
    "no prompts file": (["--model={run}", "--prompts={tmp}/no.jsonl"], "no.jsonl: No such file or directory"),
    "both prompts": (["--model={run}", "--prompt=x", "--prompts=y"], "not both"),
    "strategy": (["--model={run}", "--strategies=magic"], "magic"),
    "report folder": (["--model={run}", "--report={tmp}/no/report.json"], "folder does not exist"),
    "report over a folder": (["--model={run}", "--report={tmp}"], "it is a folder"),
    "kernels": (["--model={run}", "--kernels=some"], "value should be one of <auto|on|off>"),
    "cache": (["--model={run}", "--cache=int4"], "value should be one of <auto|int8>"),
    "cache beside others": (["--model={run}", "--cache=int8", "--compare=transformers"], "leave --weights and --cache"),
    "an unknown baseline": (
        ["--model={run}", "--compare=llama_cpp,vllm"],
        "'vllm' is not one of transformers",
    ),
    "batches beside llama.cpp": (["--model={run}", "--compare=llama_cpp", "--batch_size=2"], "one prompt at a time"),
    "drafts beside llama.cpp": (
        ["--model={run}", "--compare=llama_cpp", "--strategies=autoregressive", "--exit_layer=2"],
        "--exit_layer has no effect here: --strategies=autoregressive runs all layers",
    ),
    "no reuse of int8": (["--model={run}", "--compare=no_reuse", "--draft_weights=int8"], "drafts in int8 are never"),
    "lookup of nothing": (["--model={run}", "--strategies=autoregressive", "--lookup=4"], "--lookup is a setting of"),
    "int8 drafts of int8": (["--model={run}", "--weights=int8", "--draft_weights=int8"], "--weights"),
    "model is a file": (["--model={tmp}/null.jsonl"], "is a file, but not GGUF"),
    "a model without held-out text": (["--model={hf}"], "give --prompt or --prompts"),
    "chat without a template": (["--model={hf}", "--chat", "--prompt=hi"], "no chat template"),
    "chat without a prompt": (["--model={run}", "--chat"], "--chat needs --prompt"),
    "prompts without a prompt": (["--model={run}", "--prompts={tmp}/null.jsonl"], "must be a non-empty text"),
    "an empty stop": (["--model={run}", "--prompt=x", "--stop=y", "--stop="], "stop must be non-empty texts"),
    "not a number": (["--model={run}", "--exit_layer=two"], "--exit_layer"),
    "auto of nothing": (
        ["--model={run}", "--strategies=early_exit", "--exit_layer=auto"],
        "choice for self_speculative",
    ),
    "auto beside a bad number": (["--model={run}", "--exit_layer=5", "--num_speculations=auto"], "exit_layer 5 is out"),
    "sweep of a setting": (["--model={run}", "--sweep={tmp}/s", "--exit_layer=1"], "--sweep_exit_layers"),
    "sweep of words": (
        ["--model={run}", "--sweep={tmp}/s", "--sweep_num_speculations=1,x"],
        "--sweep_num_speculations",
    ),
    "sweep out of range": (["--model={run}", "--sweep={tmp}/s", "--sweep_exit_layers=2,9"], "exit_layer 9 is out"),
    "sweep nowhere": (["--model={run}", "--sweep=/proc/nope"], "cannot write --sweep folder"),
}


@pytest.mark.parametrize("name", BAD_DECODING)
def test_bad_decoding_input(name, tmp_path, workdir):
    arguments, message = BAD_DECODING[name]
    (tmp_path / "null.jsonl").write_text('{"prompt": null}\n')
    places = {"tmp": tmp_path, "run": workdir, "hf": RECORDED / "llama32", "smollm2": RECORDED / "smollm2"}
    result = run("decode.py", *(a.format(**places) for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "s").exists()


def test_decode_prints_a_table_and_writes_the_report(workdir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def main():"}\n{"prompt": "import os\\n"}\n\n{"prompt": "class A:"}\n')
    path = tmp_path / "report.json"
    result = run_process(
        "decode.py", f"--model={workdir}", f"--prompts={prompts}", "--exit_layer=2", "--num_speculations=3",
        "--batch_size=2", "--max_new_tokens=16", f"--report={path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "speed-up" in result.stdout
    report = json.loads(path.read_text())
    assert {"model", "device", "jax_version", "runs"} <= set(report)
    assert [run["strategy"] for run in report["runs"]] == ["autoregressive", "early_exit", "self_speculative"]
    keys = {
        "strategy", "exit_layer", "num_speculations", "batch_size", "new_tokens", "seconds", "ms_per_token",
        "tokens_per_second", "time_to_first_token_ms", "acceptance_rate", "tokens_per_round", "speedup",
        "matches_autoregressive",
    }  # fmt: skip
    assert all(keys <= set(run) for run in report["runs"])
    assert report["runs"][2]["matches_autoregressive"] is True
    assert {run["kernels"] for run in report["runs"]} == {"plain (no kernels for cpu)"}


def test_decode_prints_the_continuation_of_a_prompt(workdir):
    how = "--max_new_tokens=8", "--lookup=4", "--draft_weights=int8"
    result = run("decode.py", f"--model={workdir}", "--prompt=def main():", *how)
    assert result.returncode == 0, result.stderr
    texts = dict(part.split("\n", 1) for part in result.stdout.split("\n--- ")[1:])
    drafts = "self_speculative, exit layer 1, 4 drafts in int8"
    assert list(texts) == ["autoregressive", "early_exit, exit layer 1", drafts, f"{drafts}, 4 copied"]
    assert texts[drafts].strip() == texts[f"{drafts}, 4 copied"].strip() == texts["autoregressive"].strip()
    autoregressive = result.stdout.split("--- autoregressive\n")[1].split("\n\n--- ")[0].removeprefix("def main():")
    stop = autoregressive[3:5]
    before = autoregressive[: autoregressive.index(stop)]
    result = run("decode.py", f"--model={workdir}", "--prompt=def main():", "--max_new_tokens=8", f"--stop={stop}")
    assert f"--- autoregressive\ndef main():{before}\n\n--- early_exit" in result.stdout, result.stderr


def test_decode_with_a_cache_in_int8(workdir, tmp_path):
    path = tmp_path / "report.json"
    how = "--cache=int8", "--strategies=self_speculative", "--num_prompts=1", "--prompt_tokens=8", "--max_new_tokens=8"
    result = run("decode.py", f"--model={workdir}", *how, f"--report={path}")
    assert result.returncode == 0, result.stderr
    assert "KV cache in int8" in result.stdout
    report = json.loads(path.read_text())
    assert report["cache"] == "int8"
    assert [run["matches_autoregressive"] for run in report["runs"]] == [True, True]


def test_decode_chooses_its_setting(workdir, tmp_path):
    path = tmp_path / "report.json"
    result = run(
        "decode.py", f"--model={workdir}", "--exit_layer=auto", "--num_speculations=2", "--prompt_tokens=8",
        "--max_new_tokens=16", "--num_prompts=2", "--repeats=1", f"--report={path}", "--strategies=self_speculative",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    chosen = json.loads(path.read_text())["runs"][1]
    assert chosen["exit_layer"] in (1, 2, 3)
    assert chosen["predicted_tokens_per_round"] == pytest.approx(chosen["tokens_per_round"])
    assert f"{chosen['predicted_speedup']:.2f} times autoregressive" in result.stdout
    assert "predicted" in result.stdout.split("tokens/round")[1].splitlines()[0]


def test_decode_sweeps_a_grid(workdir, tmp_path):
    result = run(
        "decode.py", f"--model={workdir}", f"--sweep={tmp_path}/s", "--sweep_exit_layers=3,1",
        "--sweep_num_speculations=2", "--prompt_tokens=8", "--max_new_tokens=16", "--num_prompts=2", "--repeats=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "self-speculation is fastest with" in result.stdout
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    assert [(row["exit_layer"], row["num_speculations"]) for row in rows] == [("1", "2"), ("3", "2")]
    for row in rows:
        assert float(row["speedup"]) > 0
        assert float(row["predicted_speedup"]) > 0
        assert float(row["tokens_per_round"]) == pytest.approx(float(row["predicted_tokens_per_round"]))
    assert (tmp_path / "s" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_train_runs_and_resumes(text_folder, tmp_path):
    overrides = [
        "--config=configs/scratch.py", f"--workdir={tmp_path}/w", f"--config.data.corpus={text_folder}",
        "--config.data.held_out_fraction=0.2", "--config.model.num_layers=3", "--config.model.width=32",
        "--config.model.vocab_size=300", "--config.model.feed_forward_width=64", "--config.training.total_steps=4",
        "--config.training.warmup_steps=1",
    ]  # fmt: skip
    first = run_process("train.py", *overrides)
    assert first.returncode == 0, first.stderr
    assert "step 4/4" in first.stdout
    assert "ETA" in first.stdout
    assert "finished: this run has done all of its 4 steps" in run("train.py", *overrides).stdout


def test_bad_input_ends_a_process_with_status_2_and_one_line(tmp_path):
    result = run_process("train.py", "--config=scratch", f"--workdir={tmp_path}/w", "--config.mesh.data=7")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("train.py: ")
    assert "does not fit 1 device" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_convert_and_decode_the_result(workdir, tmp_path):
    for source, target, form in (
        (workdir, "hf", "huggingface"),
        (tmp_path / "hf", "again", "lsjax"),
        (workdir, "it.gguf", "gguf"),
    ):
        result = run("convert.py", f"--from={source}", f"--to={tmp_path / target}", f"--format={form}")
        assert result.returncode == 0, result.stderr
        assert "float32" in result.stdout
    texts = []
    for model in (workdir, tmp_path / "hf", tmp_path / "again", tmp_path / "it.gguf"):
        result = run("decode.py", f"--model={model}", "--prompt=import os", "--max_new_tokens=8", "--repeats=1")
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout.split("--- autoregressive")[1])
    assert texts == [texts[0]] * 4


BAD_CONVERSION = {
    "no source": (["--from={tmp}/nope", "--to={tmp}/out"], "does not exist"),
    "a folder that is full": (["--from={hf}", "--to={full}"], "exists and holds something"),
    "an unknown format": (["--from={hf}", "--to={tmp}/out", "--format=onnx"], "--format"),
    "a folder without a model": (["--from={tmp}", "--to={tmp}/out"], "no model at"),
    "an unwritable place": (["--from={hf}", "--to=/proc/nope/out"], "cannot write"),
}


@pytest.mark.parametrize("name", BAD_CONVERSION)
def test_bad_conversion_input(name, tmp_path):
    arguments, message = BAD_CONVERSION[name]
    places = {"tmp": tmp_path, "full": ROOT / "tests", "hf": RECORDED / "llama32"}
    result = run("convert.py", *(a.format(**places) for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not list(tmp_path.iterdir())


BAD_AHEAD = {
    "no topology": ([], "--topology"),
    "a chip that is none": (["--topology=tpu:v9:4x4"], "a chip of tpu:v4, tpu:v5e"),
    "a size that is none": (["--topology=tpu:v5p:4x4"], "a size of tpu:v5p is NxNxN"),
    "an unknown program": (["--topology=gpu:h100:8", "--program=sing"], "--program"),
    "report folder": (["--topology=gpu:h100:8", "--report={tmp}/no/report.json"], "folder does not exist"),
}
if importlib.util.find_spec("libtpu") is None:
    BAD_AHEAD["no compiler for TPU"] = (["--topology=tpu:v5p:4x4x4"], "make ahead")
    BAD_AHEAD["no compiler for GPU"] = (["--topology=gpu:h100:8x8"], "make ahead")


@pytest.mark.parametrize("name", BAD_AHEAD)
def test_bad_input_to_compile_ahead(name, tmp_path):
    arguments, message = BAD_AHEAD[name]
    result = run("compile_ahead.py", "--config=configs/pretrain_7b.py", *(a.format(tmp=tmp_path) for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_kernels_are_counted_where_they_cannot_be_measured(tmp_path):
    path = tmp_path / "kernels.json"
    result = run("benchmark_kernels.py", "--rows=1", "--tokens=1,4", "--lengths=100", f"--report={path}")
    assert result.returncode == 0, result.stderr
    assert "no accelerator here: nothing was measured" in result.stdout
    report = json.loads(path.read_text())
    assert not report["measured"]
    assert {run["tokens"] for run in report["runs"]} == {1, 4}
    assert {run["by"] for run in report["runs"]} == {"plain", "gpu", "jax.nn", "jax Pallas"}


BAD_BENCHMARK = {
    "words": (["--rows=two"], "--rows must be numbers"),
    "a chip that is none": (["--chip=gpu:h900"], "chip is 'gpu:h900'; it must be one of tpu:v4"),
    "longer than there is room for": (["--lengths=5000"], "length 5000 must be 1 (tokens) to 4096 (capacity)"),
    "report folder": (["--report={tmp}/no/report.json"], "folder does not exist"),
}


@pytest.mark.parametrize("name", BAD_BENCHMARK)
def test_bad_input_to_benchmark_kernels(name, tmp_path):
    arguments, message = BAD_BENCHMARK[name]
    result = run("benchmark_kernels.py", *(a.format(tmp=tmp_path) for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_training_is_timed(tmp_path):
    sizes = "--config.model.num_layers=3", "--config.model.width=32", "--config.training.sequence_length=16"
    report = tmp_path / "report.json"
    how = "--config=configs/scratch.py", "--steps=2", "--warmup=1", f"--report={report}"
    result = run("benchmark_training.py", *how, *sizes)
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stdout
    assert [run["name"] for run in json.loads(report.read_text())["runs"]] == ["lsjax"]
    result = run("benchmark_training.py", *how, "--compare=tensorflow")
    assert result.returncode == 2
    assert result.stderr == "benchmark_training.py: --compare: 'tensorflow' is not one of pytorch, compiled, full\n"
    result = run("benchmark_training.py", *how, "--compare=full")
    assert result.returncode == 2
    assert result.stderr.startswith("benchmark_training.py: --compare=full: this configuration trains everything")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name):
    result = run(f"{name}.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python launch/{name}.py --" in result.stdout
    assert result.stdout.count("\n  --") >= 2  # the flags, each with its text
    assert "--config.SECTION" in result.stdout or "--config" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "pdb" not in result.stdout  # none of absl's own flags


@pytest.mark.parametrize(("devices", "threads"), [("8", "32"), ("1", None)])
def test_virtual_devices_have_threads_to_wait_on(devices, threads):
    environment = process_environment(JAX_NUM_CPU_DEVICES=devices)
    del environment["PJRT_NPROC"]
    program = (
        "import os; from lsjax.cli.command import prepare_process; prepare_process(); "
        "print('threads', os.environ.get('PJRT_NPROC'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.stdout == f"threads {threads}\n", done.stderr
