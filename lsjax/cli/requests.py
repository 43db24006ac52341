"""The request of `lsjax generate`: what the flags say for all prompts, and the lines of --prompts for their own."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lsjax.cli.flags import Arguments
from lsjax.errors import UserError, shown

if TYPE_CHECKING:
    from lsjax.benchmarks.prompts import PromptLine
    from lsjax.decoding.batch import GenerationConfig

# Keys that a line of --prompts may hold beside "prompt".
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "stop_tokens")


def make_request(arguments: Arguments, lines: "Sequence[PromptLine]", vocab_size: int) -> "GenerationConfig":
    """Returns the request for all prompts. Raises UserError, with FILE:LINE, for a setting out of range."""
    from lsjax.decoding.batch import GenerationConfig
    from lsjax.decoding.strategies import Sampling

    settings = [_settings_of(arguments, line, vocab_size) for line in lines]

    def each(name: str) -> list[Any]:
        return [own[name] for own in settings]

    if arguments.seed and not any(each("temperature")):
        print("--seed has no effect: decoding is greedy at --temperature=0", file=sys.stderr)
    return GenerationConfig(
        max_new_tokens=each("max_new_tokens"),
        sampling=Sampling(each("temperature"), each("top_k"), each("top_p")),
        seed=arguments.seed,
        stop=each("stop"),
        stop_tokens=each("stop_tokens"),
        batch_size=(arguments.batch_size or 8) if arguments.prompts is not None else None,
    )


def _settings_of(arguments: Arguments, line: "PromptLine", vocab_size: int) -> dict[str, Any]:
    """Returns the settings of one prompt, checked; those of its line take precedence over flags.

    A temperature of 0 on a line also switches off the flags --top_k and --top_p.
    """
    from lsjax.decoding.batch import check_whole_number
    from lsjax.decoding.stop_strings import check_stop, check_stop_tokens
    from lsjax.decoding.strategies import SAMPLING_SETTINGS, Sampling, check_sampling

    flags = {name: getattr(arguments, name) for name in SETTINGS if name != "stop_tokens"} | {"stop_tokens": []}
    own = {name: line.row[name] for name in SETTINGS if name in line.row}
    if own.get("temperature") == 0:
        flags |= {"top_k": 0, "top_p": 1.0}
    settings = flags | own
    try:
        check_whole_number("max_new_tokens", settings["max_new_tokens"], least=1)
        check_sampling(Sampling(*(_one_value(name, settings[name]) for name in SAMPLING_SETTINGS)))
        settings["stop"] = check_stop(settings["stop"])
        settings["stop_tokens"] = check_stop_tokens(settings["stop_tokens"], vocab_size)
    except UserError as error:
        raise UserError(f"{line.place}: {error}" if own else str(error)) from None
    return settings


def _one_value(name: str, value: Any) -> Any:
    """Returns a value that is no list, which would be one per prompt."""
    if isinstance(value, list):
        raise UserError(f"{name} must be a number, got {shown(value)}")
    return value
