"""Eight virtual CPU devices for every test, and small real parts to test with."""

import dataclasses
import importlib.util
import os
import tempfile
from pathlib import Path

# Compiling is what tests spend their time on; unoptimised machine code, by the older emitters, takes a quarter of it.
# Here and in the processes they start. Not for programs compiled ahead of time, which are looked at as they will be.
_QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

os.environ["PJRT_NPROC"] = "32"  # threads for devices that wait for each other: lsjax/commands.py says why

import jax  # noqa: E402 (it reads the flags)
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")  # also where the compilers for TPU and GPU are installed
jax.config.update("jax_num_cpu_devices", 8)

from lsjax.config import Config, ModelConfig  # noqa: E402 (the device count is set first)
from lsjax.model.transformer import init_params  # noqa: E402

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
    """Random parameters larger than a fresh model's, so that every layer matters to the output."""
    params = init_params(jax.random.key(seed), config)
    layers = jax.tree.map(lambda a: 10 * a if a.ndim > 2 else a, params["layers"])
    return params | {"layers": layers, "embed": 20 * params["embed"]}


# With a tied head a random model repeats one token for ever, which any decoder gets right; this one wanders, and its
# exits agree with its last layer about half of the time.
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
    """A folder of real text: some modules of the standard library, small enough to tokenize at once."""
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
    return folder


@pytest.fixture
def tiny_run(text_folder) -> Config:
    """A training run of seconds on that text."""
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
            compute_dtype="float32",  # "auto" is what this processor is good at
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=5),
        evaluation=dataclasses.replace(config.evaluation, every_steps=6, max_batches=2),
    )


def process_environment(**more: str) -> dict[str, str]:
    """For the processes that tests start: what one of them compiled, the next ones of this test run need not."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"lsjax-tests-{run}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return os.environ | cache | more


def weight_products(jaxpr) -> list:
    """The products in a program and what it calls, but for those of attention, which are batched."""
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general" and not e.params["dimension_numbers"][1][0]]
    is_program = lambda a: hasattr(a, "eqns")  # noqa: E731 (open ones; closed ones hold them)
    for eqn in jaxpr.eqns:
        held = [getattr(a, "jaxpr", a) for a in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)]
        products += [product for inner in held if is_program(inner) for product in weight_products(inner)]
    return products
