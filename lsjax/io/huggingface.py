"""Reads and writes folders of Hugging Face transformers: config.json, safetensors, tokenizer.json."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lsjax.config import ModelConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError
from lsjax.files import check_not_pointer, obey_umask, read_json, write_atomically
from lsjax.io.exit_adapter import adapter_path
from lsjax.io.huggingface_config import model_config_from_hf, model_config_to_hf
from lsjax.io.layout import Piece, Slices, extract_piece, parameter_pieces
from lsjax.io.source import FileSource
from lsjax.io.tensors import StoredTensor, parameter_path
from lsjax.model.transformer import Params

CONFIG = "config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PICKLES = (".bin", ".pth", ".pt", ".pkl")


class OutgoingTensor(NamedTuple):
    """A tensor on its way into a file, under the name that Hugging Face gives it.

    read: returns its numbers as files store them, cut out of our parameters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_huggingface_config(tree: dict[str, Any]) -> bool:
    """Returns whether a config.json is one of transformers, not of lsjax."""
    return "model_type" in tree or "architectures" in tree


def open_huggingface(folder: Path) -> FileSource:
    """Opens a folder without reading its parameters.

    Raises UserError that names the first file or tensor that is missing, damaged or not part of a plain Llama.
    """
    config = read_huggingface_config(folder)
    tensors = _drop_known_extras(_open_tensors(folder), config, folder)
    return FileSource(str(folder), config, load_tokenizer(folder), tensors, adapter_path(folder))


def read_huggingface_config(folder: Path) -> ModelConfig:
    """Reads config.json of a folder."""
    path = Path(folder) / CONFIG
    return model_config_from_hf(read_json(path), str(path))


def _open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns every tensor in the folder's safetensors files, from their headers, which an index must agree with.

    As in transformers, one whole file takes precedence over an index, which an earlier save may have left behind.
    """
    if (folder / WHOLE).is_file():
        index, files = None, [WHOLE]
    elif (folder / INDEX).is_file():
        index = read_index(folder)
        files = sorted(set(index.values()))
    else:
        raise _no_weights(folder)
    tensors = {}
    for name in files:
        # A file name in an index must not lead out of the folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name!r}, which is not a file in {folder}")
        found = read_header(folder / name)
        wanted = set(found) if index is None else {tensor for tensor, file in index.items() if file == name}
        if wanted != set(found):
            first = min(wanted ^ set(found))
            if first in wanted:
                raise UserError(f"{folder / name} lacks the tensor {first}, which {INDEX} places there")
            raise UserError(f"{folder / name} holds the tensor {first}, which {INDEX} does not place there")
        tensors |= found
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Reads the file name of each tensor from the index of a folder."""
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of tensors to files")
    return index


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return UserError(
            f"{folder / pickles[0]} is a pickle, which can run any code when opened; lsjax reads safetensors only. "
            "If you trust it, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if (whole := folder / WHOLE).is_symlink() and not whole.exists():  # such as a cache whose files were deleted
        return UserError(f"{whole} is a link to {whole.readlink()}, which does not exist")
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    found = f"; it has {others[0]}, which needs an index or the name {WHOLE}" if others else ""
    return UserError(f"{folder} has no weights: neither {WHOLE} nor {INDEX}{found}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file. The library checks that their offsets tile the file and fit their shapes."""
    try:
        check_not_pointer(path)
        with safe_open(path, framework="numpy") as file:
            return {name: _stored_tensor(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None


def _stored_tensor(path: Path, name: str, header) -> StoredTensor:
    kind = header.get_dtype()
    if kind not in _DTYPES:
        raise UserError(f"{path}: {name} is stored as {kind}; lsjax reads {', '.join(_DTYPES)}")

    def read(at: Slices) -> np.ndarray:
        # Open the file for each read: its mapping is then released and does not count as our memory.
        try:
            with safe_open(path, framework="numpy") as file:
                return file.get_slice(name)[at]
        except SafetensorError as error:  # the file changed after its header was read
            raise OSError(f"{path}: {error}") from None

    return StoredTensor(tuple(header.get_shape()), jax.numpy.dtype(_DTYPES[kind]), read)


def _drop_known_extras(tensors: dict[str, StoredTensor], config: ModelConfig, folder: Path) -> dict[str, StoredTensor]:
    """Drops what old converters stored beside the weights: rotary tables, and a second copy of a tied head."""
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tie_embeddings and head and embedding:
        if not _equal_values(head, embedding):
            raise UserError(
                f"{folder / CONFIG} says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight"
            )
        del tensors["lm_head.weight"]
    return tensors


def _equal_values(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Returns whether two matrices are equal. One in a narrower dtype is equal to what it was rounded from."""
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    parts = [
        (slice(start, min(start + rows, a.shape[0])), slice(0, a.shape[1])) for start in range(0, a.shape[0], rows)
    ]
    return all(np.array_equal(a.read(part).astype(narrow), b.read(part).astype(narrow)) for part in parts)


def write_huggingface(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a folder that transformers loads. Beyond the parameters, memory holds one file of `shard_bytes`.

    Raises UserError for the one shape that transformers does not support: a width that is no multiple of num_heads.
    """
    if config.width % config.num_heads:
        raise UserError(f"transformers has no Llama of width {config.width} with {config.num_heads} heads")
    shards = list(_shards(config, params, shard_bytes))
    names = [WHOLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    weight_map, total = {}, 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {tensor.name: tensor.read() for tensor in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        obey_umask(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.size for tensor in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json.dumps(index, indent=2))
    tokenizer.save(folder)
    tree = model_config_to_hf(config) | {"dtype": str(params["embed"].dtype), "eos_token_id": list(tokenizer.stop)}
    tree |= {"torch_dtype": tree["dtype"], "bos_token_id": tokenizer.begin}
    write_atomically(folder / CONFIG, json.dumps(tree, indent=2))


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _shards(config: ModelConfig, params: Params, shard_bytes: int) -> Iterator[list[OutgoingTensor]]:
    """Yields the tensors of each file in the order of the layers."""
    shard, filled = [], 0
    for tensor in outgoing_tensors(config, params):
        if shard and filled + tensor.size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.size
    yield shard


def outgoing_tensors(config: ModelConfig, params: Params) -> Iterator[OutgoingTensor]:
    """Yields every tensor of a model: the embedding, layer after layer, the final norm and the head."""
    leaves = {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    found = []
    for path, pieces in parameter_pieces(config).items():
        stacked = path.startswith("layers/")
        outside = -1 if path == "embed" else config.num_layers
        for layer in range(config.num_layers) if stacked else (None,):
            found += [(outside if layer is None else layer, piece, leaves[path], layer) for piece in pieces]
    for _, piece, leaf, layer in sorted(found, key=lambda entry: entry[0]):
        name, read = piece.tensor.format(layer=layer), functools.partial(_extract, leaf, piece, layer)
        yield OutgoingTensor(name, piece.shape, leaf.dtype, read)


def _extract(leaf: Any, piece: Piece, layer: int | None) -> np.ndarray:
    return extract_piece(piece, np.asarray(leaf if layer is None else leaf[layer]))
