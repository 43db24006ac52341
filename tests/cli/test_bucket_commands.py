"""Commands on models in buckets, and the one line for each way in which a bucket cannot be used."""

import http.server
import json
import sys
import threading

import jax
import numpy as np
import pytest

import lsjax
from lsjax.cli.main import main
from lsjax.errors import UserError
from lsjax.files import as_path
from lsjax.training.loop import train
from lsjax.tuning.tuned_settings import read_settings
from tests.helpers.stores import BUCKET, GCS_ENVIRONMENT, S3_ENVIRONMENT, bucket_at, require_servers
from tests.test_commands import run_process

require_servers()

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(
    scope="module", params=[pytest.param("gs", id="gs"), pytest.param("s3", id="s3", marks=pytest.mark.slow)]
)
def bucket(request, tmp_path_factory):
    with bucket_at(request.param, tmp_path_factory.mktemp("scratch")) as url:
        yield url


@pytest.fixture(scope="module")
def workdir(bucket, text_folder):
    """The URL of a finished run."""
    from tests import conftest

    train(conftest.tiny_run.__wrapped__(text_folder), f"{bucket}/run", verbose=False)
    return f"{bucket}/run"


def test_text_is_generated(workdir, capsys):
    assert main(["generate", f"--model={workdir}", "--prompt=def f(", "--max_new_tokens=4"]) == 0
    assert capsys.readouterr().out


def test_a_benchmark_takes_prompts_and_leaves_a_report_in_the_bucket(workdir, capsys):
    report = f"{workdir}/report.json"
    short = ["--repeats=1", "--num_prompts=1", "--max_new_tokens=4", "--prompt_tokens=4"]
    assert main(["decode", f"--model={workdir}", f"--report={report}", *short]) == 0, capsys.readouterr()
    assert {run["strategy"] for run in json.loads(as_path(report).read_text())["runs"]} >= {"autoregressive"}


def test_held_out_text_is_evaluated(workdir, capsys):
    assert main(["evaluate", f"--model={workdir}", "--tasks=held_out_text", "--num_examples=2"]) == 0
    assert "held_out_text" in capsys.readouterr().out


def test_frequent_tokens_are_counted(workdir):
    assert main(["draft_vocabulary", f"--model={workdir}"]) == 0
    assert json.loads((as_path(workdir) / "draft_vocabulary.json").read_text())["vocab_size"] == 320


def test_tuned_settings_are_kept_in_the_bucket(workdir, capsys, caplog):
    short = ["--num_prompts=1", "--prompt_tokens=4", "--max_new_tokens=4", "--temperatures=0", "--batch_sizes=1"]
    assert main(["tune", f"--model={workdir}", *short]) == 0, capsys.readouterr()
    path = as_path(workdir) / "tuned_settings.json"
    assert capsys.readouterr().out.endswith(f"table: {path}\n")
    (setting,) = read_settings(path, num_layers=4).settings
    lsjax.generate(lsjax.load(workdir), "def f(", 4, lsjax.SelfSpeculative("auto", "auto"))
    assert f'"auto" takes a setting of {path}: {setting}' in [record.getMessage() for record in caplog.records]


def test_models_are_converted_into_and_out_of_a_bucket(bucket, workdir, tmp_path):
    original = lsjax.load(workdir)
    here, there, ours = tmp_path / "hf", f"{bucket}/converted/hf", f"{bucket}/converted/ours"
    assert main(["convert", f"--from={workdir}", f"--to={here}", "--format=huggingface"]) == 0
    assert main(["convert", f"--from={workdir}", f"--to={there}", "--format=huggingface"]) == 0
    assert main(["convert", f"--from={there}", f"--to={ours}", "--format=lsjax"]) == 0
    assert main(["convert", f"--from={workdir}", f"--to={there}", "--format=huggingface"]) == 2  # it holds something
    for path in (here, there, ours):
        jax.tree.map(np.testing.assert_array_equal, lsjax.load(path).params, original.params)
    assert (as_path(there) / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()


def test_a_run_starts_from_a_model_in_a_bucket(bucket, workdir, tiny_run):
    from tests.helpers.runs import continuing

    train(continuing(tiny_run, workdir), f"{bucket}/continued", verbose=False)
    assert lsjax.load(f"{bucket}/continued").step == 4


def test_a_bucket_that_is_not_there_is_named(bucket, workdir, capsys):
    nowhere = f"{bucket}-of-nobody/run"
    assert main(["train", "--config=scratch", f"--workdir={nowhere}"]) == 2
    error = capsys.readouterr().err
    assert f"cannot write workdir {nowhere}: no such object, or no bucket {BUCKET}-of-nobody" in error
    assert error.count("\n") == 1
    assert main(["generate", f"--model={nowhere}", "--prompt=x"]) == 2
    assert f"no model at {nowhere}: it does not exist" in capsys.readouterr().err


def test_results_that_are_written_line_by_line_need_a_disk(workdir, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    output = f"{workdir}/texts.jsonl"
    assert main(["generate", f"--model={workdir}", f"--prompts={tmp_path}/p.jsonl", f"--output={output}"]) == 2
    assert f"--output {output} is in a bucket; it must be on a disk" in capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_extra_is_named(scheme, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    assert main(["train", "--config=scratch", f"--workdir={scheme}://b/run"]) == 2
    error = capsys.readouterr().err
    assert f"{scheme}://b/run needs {package}: pip install 'lsjax[{extra}]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("path", ["az://b/run", "http://b/run", "gs://", "s3:///", "gs://b/../run"])
def test_other_urls_are_refused(path):
    with pytest.raises(UserError, match=r"workdir must be a path on a disk, gs://BUCKET/PATH or s3://BUCKET/PATH"):
        as_path(path, "workdir")


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as Google Cloud Storage does to a request without credentials."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        text = "Anonymous caller does not have storage.objects.create access to the Google Cloud Storage object."
        body = json.dumps({"error": {"code": 401, "message": text, "errors": [{"message": text}]}}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_missing_credentials_are_named():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    google = GCS_ENVIRONMENT | {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_address[1]}"}
    amazon = dict.fromkeys(S3_ENVIRONMENT, "") | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1"}
    amazon |= {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}
    for scheme, environment, wanted in (
        ("gs", google, "gcloud auth application-default login"),
        ("s3", amazon, "AWS_ACCESS_KEY_ID"),
    ):
        url = f"{scheme}://{BUCKET}/run"
        run = run_process("train.py", "--config=scratch", f"--workdir={url}", JAX_PLATFORMS="cpu", **environment)
        assert run.returncode == 2, run.stderr
        assert f"train.py: cannot write workdir {url}: no credentials" in run.stderr
        assert wanted in run.stderr
        assert run.stderr.count("\n") == 1, run.stderr
    server.shutdown()
