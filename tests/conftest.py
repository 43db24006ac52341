"""Gives every test eight virtual CPU devices and small real models, texts and runs to test with."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import signal
import tempfile
from pathlib import Path

# Tests spend most of their time compiling. Unoptimised machine code by XLA's older emitters takes a quarter of the
# time. The processes that tests start inherit the flags. Ahead-of-time tests keep XLA's defaults, because they look at
# programs as users compile them.
_QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jax").startswith("0.10."):  # a later XLA ends the process when it is given this flag
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
if importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

# A path that does not exist may be a name on the Hugging Face Hub. No test asks the Hub itself.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell that starts the tests in the background, or nohup, leaves these signals ignored, also in what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ["PJRT_NPROC"] = "32"  # threads for devices that wait for each other: lsjax/cli/command.py says why

import jax  # noqa: E402 (it reads the flags)
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache as jax_cache  # noqa: E402

jax.config.update("jax_platforms", "cpu")  # also where the compilers for TPU and GPU are installed
jax.config.update("jax_num_cpu_devices", 8)

from lsjax.config import Config, ModelConfig  # noqa: E402 (the device count is set first)
from lsjax.data.documents import digest_of, is_held_out  # noqa: E402
from lsjax.model.transformer import init_params  # noqa: E402

# The tests marked `smoke`, by the beginnings of their ids: a minute that uses every dependency. `make test-pythons`
# and `make test-lowest` run them with other versions of Python and of the packages.
SMOKE = (
    "tests/test_import.py",
    "tests/test_configs.py",
    "tests/cli/test_flags.py",
    "tests/cli/test_generate.py::test_one_prompt_is_streamed",
    "tests/cli/test_generate.py::test_drafts_leave_the_text",
    "tests/data/test_bucket_data.py::test_shards_share_only_a_bucket",
    "tests/training/test_bucket_runs.py::test_a_bucket_holds_what_a_disk_would",
    "tests/reports/test_tables.py",
    "tests/reports/test_layer_predictions.py::test_the_picture_is_a_png",
    "tests/decoding/test_sampling.py::test_filters_are_their_definitions",
    "tests/training/test_loop.py::test_a_run_leaves_what_it_promises",
    "tests/training/test_loop.py::test_the_workdir_alone_is_loadable",
    "tests/io/test_huggingface.py::test_logits_states_and_greedy_tokens_are_those_of_transformers[llama31]",
    "tests/io/test_huggingface.py::test_there_and_back_keeps_every_bit",
    "tests/io/test_huggingface.py::test_a_conversation_goes_through_the_models_template",
    "tests/io/test_gguf.py::test_the_same_parameters_as_from_hugging_face",
    "tests/io/test_hub.py::test_a_hub_name_loads_the_same_model_and_only_its_files",
    "tests/io/test_hub.py::test_a_cached_model_needs_no_network",
    "tests/io/test_hub.py::test_one_line_says_what_is_wrong",
    "tests/io/test_hub.py::test_the_command_line_obeys_the_environment",
)


def pytest_ignore_collect(collection_path, config):
    """Leaves out files without smoke tests for `-m smoke`: their imports take longer than the tests, or need torch."""
    path = collection_path.relative_to(config.rootpath).as_posix()
    if config.option.markexpr == "smoke" and path.endswith(".py") and not any(path in entry for entry in SMOKE):
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(SMOKE):
            item.add_marker(pytest.mark.smoke)


TINY = ModelConfig(
    num_layers=4,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    feed_forward_width=48,
    vocab_size=320,
    context_length=128,
)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_params():
    return random_params(TINY)


def random_params(config: ModelConfig, seed: int = 0):
    """Returns random parameters larger than a fresh model's, so that every layer matters to the output."""
    params = init_params(jax.random.key(seed), config)
    layers = jax.tree.map(lambda a: 10 * a if a.ndim > 2 else a, params["layers"])
    return params | {"layers": layers, "embed": 20 * params["embed"]}


# A random model with a tied head repeats one token for ever, which any decoder gets right. This model's text varies,
# and its exits agree with its last layer about half of the time.
VARIED = dataclasses.replace(TINY, tie_embeddings=False)


@pytest.fixture(scope="session")
def varied() -> ModelConfig:
    return VARIED


@pytest.fixture(scope="session")
def varied_params():
    params = random_params(VARIED)
    return params | {"layers": jax.tree.map(lambda a: 0.4 * a if a.ndim > 2 else a, params["layers"])}


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Returns a folder of real text: modules of the standard library, small enough to tokenize at once."""
    import json as _json
    import pathlib

    source = pathlib.Path(_json.__file__).parent.parent
    folder = tmp_path_factory.mktemp("text")
    for name in (
        "argparse",
        "ast",
        "bisect",
        "calendar",
        "cmd",
        "code",
        "copy",
        "csv",
        "dis",
        "glob",
        "heapq",
        "shlex",
    ):
        (folder / f"{name}.py").write_text((source / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    # The split of a document follows from its content. With Python 3.13, none of these would be held out.
    while not any(is_held_out(digest_of(path.read_bytes()), 0.2) for path in folder.iterdir()):
        with (folder / "bisect.py").open("a", encoding="utf-8") as file:
            file.write("\n")
    return folder


@pytest.fixture
def tiny_run(text_folder) -> Config:
    """Returns the configuration of a training run on that text that takes seconds."""
    config = Config(model=TINY)
    return dataclasses.replace(
        config,
        layerskip=dataclasses.replace(config.layerskip, exit_rotation=3),
        data=dataclasses.replace(config.data, corpus=str(text_folder), held_out_fraction=0.2),
        training=dataclasses.replace(
            config.training,
            total_steps=12,
            batch_size=8,
            sequence_length=32,
            warmup_steps=2,
            log_every_steps=1,
            loss_chunk=64,
            compute_dtype="float32",  # "auto" would depend on this processor
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=5),
        evaluation=dataclasses.replace(config.evaluation, every_steps=6, max_batches=2),
    )


# Settings of JAX's compilation cache on disk. Every process of one test run shares one folder.
_TEST_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_COMPILATION_CACHE = {
    "jax_compilation_cache_dir": str(Path(tempfile.gettempdir()) / f"lsjax-tests-{_TEST_RUN}"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


def process_environment(**more: str) -> dict[str, str]:
    """Returns the environment for processes that tests start: they share compiled programs through files."""
    return os.environ | {name.upper(): str(value) for name, value in _COMPILATION_CACHE.items()} | more


@pytest.fixture(scope="module")
def compilation_cache():
    """Shares compiled programs through files with every test and process of this test run.

    For modules that train: each run compiles its step anew. Not for tests that look into a compiled program, which
    could be one read from a file.
    """
    before = {name: getattr(jax.config, name) for name in _COMPILATION_CACHE}
    jax_cache.reset_cache()  # JAX decides once whether it uses the cache
    for name, value in _COMPILATION_CACHE.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def weight_products(jaxpr) -> list:
    """Returns the products with weights in a jaxpr and in those that it calls; attention's products are batched."""
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general" and not e.params["dimension_numbers"][1][0]]
    for eqn in jaxpr.eqns:
        values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        inner = [getattr(value, "jaxpr", value) for value in values]  # a closed jaxpr holds an open one
        products += [product for program in inner if _is_jaxpr(program) for product in weight_products(program)]
    return products


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")
