"""The wheel works on its own: installed into a fresh environment, outside any checkout, by the command `lsjax`."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import process_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = {
    "model.num_layers": 2,
    "model.width": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_width": 16,
    "model.feed_forward_width": 48,
    "model.vocab_size": 320,
    "layerskip.draft_exit": 1,
    "training.total_steps": 5,
    "training.warmup_steps": 1,
    "training.batch_size": 2,
    "training.sequence_length": 32,
    "data.held_out_fraction": 0.2,
    "evaluation.max_batches": 1,
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("lsjax-*.whl"))


@pytest.fixture(scope="module")
def lsjax(wheel, tmp_path_factory):
    """Returns a function that runs `lsjax ARGUMENTS` of the installed wheel in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    # The libraries that lsjax needs are borrowed from this environment. The wheel's own files come first on the path.
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    workspace = folder / "workspace"
    workspace.mkdir()
    environment = {key: value for key, value in process_environment().items() if key != "PYTHONPATH"}

    def run(*arguments: str, code: int = 0) -> str:
        command = [str(python.with_name("lsjax")), *arguments]
        done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    where = "import lsjax, pallas_kernels; print(lsjax.__file__, pallas_kernels.__file__)"
    found = subprocess.run([python, "-c", where], cwd=workspace, env=environment, capture_output=True, text=True)
    assert found.stdout.count(str(packages)) == 2, found.stdout + found.stderr
    run.workspace = workspace
    return run


def test_the_wheel_holds_the_package_its_types_the_configurations_and_the_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lsjax/py.typed", "lsjax/configs/pretrain_7b.py", "pallas_kernels/kv_cache/interface.py"} <= set(names)
    assert "lsjax/models/python-20m/model.safetensors" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"lsjax", "pallas_kernels"}


def test_help_fits_one_screen_and_names_every_command(lsjax):
    text = lsjax("--help")
    assert text.count("\n") <= 40
    assert all(len(line) <= 80 for line in text.splitlines())
    for name in ("train", "generate", "decode", "convert", "compile_ahead"):
        assert f"  {name} " in text
    assert lsjax("--version").startswith("lsjax ")


def test_it_trains_by_name_generates_and_converts(lsjax, text_folder):
    overrides = [f"--config.{key}={value}" for key, value in SMALL.items()]
    lsjax("train", "--config=scratch", "--workdir=run", f"--config.data.corpus={text_folder}", *overrides)
    steps = [json.loads(line)["step"] for line in (lsjax.workspace / "run" / "metrics.jsonl").open()]
    assert steps[-1] == 5
    shown = lsjax("generate", "--model=run", "--prompt=import os", "--max_new_tokens=8")
    assert "tokens per second" in shown or "tokens/s" in shown
    lsjax("convert", "--from=run", "--to=exported", "--format=huggingface")
    assert sorted(os.listdir(lsjax.workspace)) == ["exported", "run"]
    again = lsjax("generate", "--model=exported", "--prompt=import os", "--max_new_tokens=8")
    assert again.splitlines()[0] == shown.splitlines()[0]


def test_the_model_that_ships_is_found_by_name(lsjax):
    shown = lsjax("generate", "--model=python-20m", "--prompt=import os", "--max_new_tokens=8")
    assert "tokens per second" in shown or "tokens/s" in shown


def test_an_unknown_name_is_one_line_and_status_2(lsjax):
    assert "did you mean train" in lsjax("trian", code=2)
    error = lsjax("train", "--config=pretrain7b", "--workdir=x", code=2)
    assert "pretrain_7b" in error
    assert error.count("\n") == 1
    assert not (lsjax.workspace / "x").exists()
