"""Decoding by llama.cpp with the same weights, timed like our own strategies: an independent baseline on CPUs."""

import contextlib
import http.client
import importlib
import importlib.metadata
import json
import os
import re
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType as Kind

from lsjax.benchmarks.measurements import other_library_stats
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.results import GenerateResult
from lsjax.errors import UserError
from lsjax.io.gguf_vocabulary import placeholder_vocabulary
from lsjax.io.gguf_writer import write_gguf

PACKAGE = "xllamacpp"
INSTALL_HINT = f"run `make parity`, or pip install {PACKAGE}"
# F32 is what we decode in on a CPU. BF16 and Q8_0 round weights and the inputs of products, and are what people use.
KINDS = (Kind.F32, Kind.BF16, Kind.Q8_0)
_GREEDY = {
    "return_tokens": True,
    "cache_prompt": False,  # every repeat reads its prompt anew, as ours do
    # Its greedy decoding that does the least work: the best token alone.
    "samplers": ["top_k"],
    "top_k": 1,
}


class DecodedByLlamaCpp(NamedTuple):
    """The new tokens of a text, the seconds up to the first one, and the seconds for all others, by its own clock."""

    tokens: list[int]
    first_seconds: float
    seconds: float


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may run on, which JAX uses too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaCppServer:
    """A GGUF file in llama.cpp, which runs as a server in this process.

    kind: the type of the file's matrices. With F32 everything is: the KV cache too, and no flash attention, which would
        round keys and values to F16. Otherwise both are llama.cpp's default, a cache in F16 and flash attention.
    context: the most tokens that a prompt and its new tokens have.
    threads: those that compute; None takes one per core.

    Raises UserError when the package is not installed, or when llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, kind: Kind, context: int, threads: int | None = None):
        self.kind, self.threads = kind, threads or usable_cores()
        xllamacpp = import_library()
        p = xllamacpp.CommonParams()
        p.model.path = str(path)
        p.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # read it: the file is removed afterwards
        p.n_ctx, p.n_parallel = context, 1
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = self.threads
        if kind == Kind.F32:
            p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.fit_params = False  # that would load the file twice
        p.cache_ram_mib = p.n_ctx_checkpoints = 0  # keep no prompts for later requests
        p.enable_chat_template = False
        p.verbosity = 0
        try:
            self._server = xllamacpp.Server(p)
        except RuntimeError as error:
            raise UserError(f"llama.cpp cannot load {path}: {error}") from None
        address = urllib.parse.urlsplit(self._server.listening_address)
        self._host, self._port = address.hostname or "", address.port

    def decode(self, prompt: Sequence[int], max_new_tokens: int) -> DecodedByLlamaCpp:
        """Decodes the greedy text of a prompt of token ids, up to and including a token that ends it."""
        answer = self.post("/completion", {"prompt": list(prompt), "n_predict": max_new_tokens} | _GREEDY)
        timings = answer["timings"]
        # Its clock of the prompt stops when the first token is chosen, and that of the new tokens starts there.
        return DecodedByLlamaCpp(answer["tokens"], timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3)

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """Sends a request of llama.cpp's own HTTP interface, and returns the answer."""
        with contextlib.closing(http.client.HTTPConnection(self._host, self._port)) as connection:
            connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        if response.status != 200:
            raise UserError(f"llama.cpp answers {path} with status {response.status}: {text[:300].decode()}")
        return json.loads(text)


def import_library() -> Any:
    """Returns the package that brings llama.cpp. Raises UserError when it is not installed."""
    try:
        return importlib.import_module(PACKAGE)
    except ImportError:
        raise UserError(f"comparing with llama.cpp needs {PACKAGE}: {INSTALL_HINT}") from None


def serve_model(model: Model, kind: Kind, context: int, threads: int | None = None) -> LlamaCppServer:
    """Writes the weights of a model as GGUF and loads them into llama.cpp.

    The file has no real vocabulary, since only token ids are sent: so a tokenizer of any kind will do. kind, context,
    threads: as in LlamaCppServer. Raises UserError when the weights do not fit `kind`.
    """
    import_library()
    vocabulary = placeholder_vocabulary(model.config.vocab_size, model.tokenizer.stop, model.path or "the model")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind.name}.gguf"
        write_gguf(path, model.config, model.stack_params(), vocabulary, kind)
        return LlamaCppServer(path, kind, context, threads)


def describe_library(threads: int | None = None) -> str:
    """Returns a line that names the package, its version, and the instructions that its llama.cpp was built for.

    threads: as in LlamaCppServer.
    """
    features = ", ".join(re.findall(r"(\w+) = 1", import_library().get_system_info()))
    version = importlib.metadata.version(PACKAGE)
    return f"llama.cpp of {PACKAGE} {version}, {threads or usable_cores()} thread(s), built with {features}"


class LlamaCppDecoder:
    """llama.cpp with one type of weights as a Decoder, measured beside our strategies, one prompt at a time."""

    strategy = None

    def __init__(self, server: LlamaCppServer, batches: list[PromptBatch]):
        self.server, self.batches = server, batches

    @property
    def label(self) -> str:
        """The library and the type of its weights."""
        return f"llama.cpp, {self.server.kind.name}"

    def compile(self) -> float:
        """Decodes once as a warm-up, and returns 0, since nothing is compiled."""
        self.decode(0)
        return 0.0

    def decode(self, batch_index: int) -> GenerateResult:
        """Decodes the prompt of one batch, and returns stats with the keys of our own."""
        batch = self.batches[batch_index]
        tokens, first_seconds, seconds = self.server.decode(batch.prompt(0), int(batch.max_new_tokens[0]))
        return GenerateResult([tokens], [], other_library_stats(self.label, [tokens], first_seconds, seconds))

    def bytes_per_round(self) -> None:
        """Returns None: the bytes that llama.cpp reads are not known."""


def llama_cpp_decoders(model: Model, batches: list[PromptBatch]) -> list[LlamaCppDecoder]:
    """Returns the decoders that a benchmark compares with, one per type of weights."""
    context = max(int(batch.lengths.max() + batch.max_new_tokens.max()) for batch in batches)
    return [LlamaCppDecoder(serve_model(model, kind, context), batches) for kind in KINDS]
