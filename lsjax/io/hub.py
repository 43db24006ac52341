"""Fetches models from the Hugging Face Hub by name: org/name[@revision], or org/name[@revision]:FILE.gguf.

huggingface_hub does the transfer. It keeps files in its own cache, shows progress on a terminal, and obeys HF_HOME,
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Only the files that lsjax reads are fetched, weights after everything else.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from lsjax.data.tokenizer import TOKENIZER
from lsjax.data.tokenizer_files import FILES as TOKENIZER_FILES
from lsjax.data.tokenizer_files import OTHER_FORMATS
from lsjax.errors import UserError
from lsjax.io.exit_adapter import FILE as EXIT_ADAPTER
from lsjax.io.gguf_file import part_names
from lsjax.io.hub_errors import explain
from lsjax.io.huggingface import CONFIG, INDEX, PICKLES, WHOLE, read_huggingface_config, read_index

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^@:]+))?(?::([^:]+))?", re.ASCII)
_LIBRARY = "lsjax"  # in the user agent


class HubName(NamedTuple):
    """The name of a model on the Hub.

    text: the name as it was given. repository: org/name. revision: a branch, tag or commit; None for the default
    branch. file: a GGUF file in the repository; None for a model of safetensors.
    """

    text: str
    repository: str
    revision: str | None
    file: str | None


def parse_hub_name(path: str | Path) -> HubName | None:
    """Returns the parts of a Hub name; None for anything else, and for every path that exists on this machine."""
    match = _NAME.fullmatch(str(path))
    if match is None or os.path.exists(path):
        return None
    name = HubName(str(path), *match.groups())
    if name.file and not name.file.endswith(".gguf"):
        raise UserError(f"no model at {path}: no such file here, and in a Hub name only a .gguf file follows the colon")
    return name


def fetch_model(name: HubName, with_weights: bool = True) -> Path:
    """Returns the folder or GGUF file of a model in huggingface_hub's cache, after fetching what it lacks.

    with_weights: False fetches config.json alone, which is enough for the model's shape. A GGUF file comes whole.

    Raises UserError that says what is missing or forbidden. A model that lsjax cannot read is refused before its
    weights are fetched.
    """
    repository = _Repository(name)
    if name.file:
        return _fetch_gguf(repository, name.file)
    if not repository.has(CONFIG):
        raise _no_config(repository)
    folder = repository.fetch(CONFIG).parent
    read_huggingface_config(folder)
    if with_weights:
        _fetch_tokenizer(repository)
        if repository.has(EXIT_ADAPTER):
            repository.fetch(EXIT_ADAPTER)
        _fetch_weights(repository, folder)
    return folder


class _Repository:
    """The files of one repository at one revision: those of the Hub, or those in the cache if the Hub does not answer.

    The first file that is fetched fixes the commit of the others.
    """

    def __init__(self, name: HubName):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

        self.name = name
        self._commit = name.revision
        self._problem: Exception | None = None
        self._files: set[str] = set()
        try:
            info = HfApi(library_name=_LIBRARY).model_info(
                name.repository, revision=name.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            self._files = {file.rfilename for file in info.siblings or []}
        except (RevisionNotFoundError, HFValidationError) as error:  # what the cache holds does not matter
            raise self.explain(error) from None
        except Exception as error:  # the library passes on those of its HTTP client, which differs by version
            self._problem = error

    def has(self, file: str) -> bool:
        """Returns whether the repository has a file: on the Hub, or in the cache if the Hub does not answer."""
        if self._problem is None:
            return file in self._files
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.name.repository, file, revision=self._commit), str)

    def fetch(self, file: str) -> Path:
        """Returns the path of a file in the cache, after fetching it if it is not there."""
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(
                self.name.repository,
                file,
                revision=self._commit,
                library_name=_LIBRARY,
                local_files_only=self._problem is not None,
            )
        except Exception as error:
            raise self.explain(self._problem or error, file) from None
        self._commit = Path(path).parents[file.count("/")].name
        return Path(path)

    def ending(self, *suffixes: str) -> list[str]:
        """Returns the files on the Hub whose names end with one of `suffixes`."""
        return sorted(file for file in self._files if file.endswith(suffixes))

    def lacks(self, what: str) -> UserError:
        """Returns the error for a repository that `what`; when the Hub does not answer, the reason for that."""
        if self._problem is not None:
            return self.explain(self._problem)
        return UserError(f"{self.name.repository} on the Hub {what}")

    def explain(self, error: Exception, file: str = "") -> UserError:
        return explain(error, self.name.text, self.name.repository, self.name.revision, file)


def _fetch_gguf(repository: _Repository, file: str) -> Path:
    """Fetches a GGUF file and, if it is split, the others that belong to it."""
    if not repository.has(file):
        raise repository.lacks(f"has no file {file}{_listed('; its GGUF files: ', repository.ending('.gguf'))}")
    return {part: repository.fetch(part) for part in part_names(file)}[file]


def _fetch_tokenizer(repository: _Repository) -> None:
    if not repository.has(TOKENIZER):
        others = [file for file in OTHER_FORMATS if repository.has(file)]
        hint = f", only {others[0]}: {_convert_hint(repository, 'AutoTokenizer')}" if others else ""
        raise repository.lacks(f"has no {TOKENIZER}{hint}")
    for file in TOKENIZER_FILES:
        if repository.has(file):
            repository.fetch(file)


def _fetch_weights(repository: _Repository, folder: Path) -> None:
    """Fetches the files of the weights. As for a folder, one whole file takes precedence over an index."""
    if repository.has(WHOLE):
        repository.fetch(WHOLE)
    elif repository.has(INDEX):
        repository.fetch(INDEX)
        for file in sorted(set(read_index(folder).values())):
            repository.fetch(file)
    elif pickles := repository.ending(*PICKLES):
        file = next((file for file in pickles if file.startswith("pytorch_model")), pickles[0])
        raise repository.lacks(
            f"has its weights in {file}, a pickle, which can run any code when opened; lsjax reads safetensors "
            f"only. If you trust it: {_convert_hint(repository, 'AutoModelForCausalLM')}"
        )
    else:
        others = _listed("; it has ", repository.ending(".safetensors"))
        raise repository.lacks(f"has no weights: neither {WHOLE} nor {INDEX}{others}")


def _no_config(repository: _Repository) -> UserError:
    if files := repository.ending(".gguf"):
        name = repository.name
        return repository.lacks(
            f"holds GGUF files: choose one, as in {name.text}:{files[0]}{_listed('; all: ', files)}"
        )
    adapter = ", but an adapter of PEFT: download it, then give its base model and that folder as the adapter"
    return repository.lacks(f"has no {CONFIG}{adapter if repository.has('adapter_config.json') else ''}")


def _convert_hint(repository: _Repository, cls: str) -> str:
    return (
        f"convert it with transformers, {cls}.from_pretrained({repository.name.repository!r})"
        ".save_pretrained(FOLDER), and give FOLDER"
    )


def _listed(intro: str, files: list[str]) -> str:
    """Returns the first few names after `intro`; nothing when there are none."""
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return f"{intro}{', '.join(files[:5])}{more}" if files else ""
