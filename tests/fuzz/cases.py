"""All malformed inputs, and the few of them that run with the other tests."""

from tests.fuzz.api_cases import api_cases
from tests.fuzz.argument_cases import argument_cases
from tests.fuzz.command_cases import command_cases
from tests.fuzz.gguf_cases import odd_gguf_cases
from tests.fuzz.model_cases import gguf_cases, huggingface_cases
from tests.fuzz.reader_cases import reader_cases
from tests.fuzz.text_cases import text_cases
from tests.fuzz.tokenizer_cases import tokenizer_cases
from tests.fuzz.workdir_cases import workdir_cases

ALL = [
    *api_cases(),
    *argument_cases(),
    *huggingface_cases(),
    *gguf_cases(),
    *odd_gguf_cases(),
    *tokenizer_cases(),
    *workdir_cases(),
    *text_cases(),
    *reader_cases(),
    *command_cases(),
]
_STEP = 20
FEW = ALL[::_STEP]
