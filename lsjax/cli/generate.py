"""Continues prompts with a trained model.

The continuation of one prompt is printed as it is decoded, and a line of figures follows:

  lsjax generate --model=runs/demo --prompt="def main():"
  lsjax generate --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
    --chat --prompt="Hi!"

A file of prompts is decoded side by side. Each prompt gives a line of JSON when it has ended, with the keys prompt,
text, tokens, finish_reason and stats, in --output or on standard output:

  lsjax generate --model=runs/demo --prompts=prompts.jsonl \\
    --output=texts.jsonl --batch_size=8

A line may also hold settings of its own, such as {"prompt": "def",
"temperature": 0.8, "stop": ["\\n\\n"]}. They take precedence over flags.

A model that was trained for a draft exit (config.layerskip.draft_exit) decodes self-speculatively, any other model
autoregressively. --exit_layer or --strategy chooses otherwise.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lsjax.cli import decoding_flags as shared
from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.cli.requests import SETTINGS, make_request
from lsjax.errors import UserError

if TYPE_CHECKING:
    from lsjax.decoding.batch import GenerationConfig, Prompt
    from lsjax.decoding.model import Model
    from lsjax.decoding.strategies import Strategy

_PROMPTS_HELP = (
    'A .jsonl file with one {"prompt": TEXT} per line, and maybe settings of that prompt alone: ' + ", ".join(SETTINGS)
)
_SECONDS_BETWEEN_NOTES = 5.0


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to continue")
    shared.define_model_and_prompts(flags, _PROMPTS_HELP)
    flags.group("Strategy")
    flags.choice(
        "strategy",
        None,
        shared.STRATEGIES,
        "Default: self_speculative for a model with a draft exit or with --exit_layer, else autoregressive.",
    )
    shared.define_setting(flags)
    flags.integer("batch_size", None, "With --prompts: decode this many side by side (default: 8).", at_least=1)
    flags.group("Sampling")
    shared.define_sampling(flags)
    flags.group("Hardware")
    shared.define_hardware(flags)
    flags.group("Output")
    flags.path("output", None, "A new .jsonl file for the results, one line per prompt.")


def main(arguments: Arguments) -> None:
    """Runs the command."""
    lines = shared.given_prompts(arguments)
    if not lines:
        raise UserError("give --prompt=TEXT or --prompts=FILE.jsonl")
    if arguments.prompt is not None:
        arguments.refuse(["batch_size"], "there is one prompt")
    write = _line_writer(arguments.output)
    strategy_name = _strategy_name(arguments)
    model = shared.load_model(arguments)
    strategy = _make_strategy(arguments, strategy_name, model.config.num_layers)
    request, texts = make_request(arguments, lines, model.config.vocab_size), [line.prompt for line in lines]
    prompts = shared.make_prompts(arguments, model, texts)
    if arguments.prompt is not None:
        _stream(model, prompts[0], strategy, request, arguments.prompt, write)
    else:
        _generate_all(model, prompts, strategy, request, texts, write or _print_line)


def _strategy_name(arguments: Arguments) -> str:
    """Returns the strategy of the flags. Raises UserError for flags that belong to another one."""
    name = arguments.strategy
    if name is None:
        drafts = any(arguments.given(flag) for flag in ("exit_layer", *shared.DRAFT_FLAGS))
        name = "self_speculative" if drafts or shared.trained_draft_exit(arguments) else "autoregressive"
    if name != "self_speculative":
        arguments.refuse(shared.DRAFT_FLAGS, f"it is a setting of self_speculative, and --strategy is {name}")
    if name == "autoregressive":
        arguments.refuse(["exit_layer"], "autoregressive decoding runs all layers")
    if arguments.exit_layer == "auto" and name == "early_exit":
        raise UserError("--exit_layer=auto is a choice for self_speculative: give a number with early_exit")
    if arguments.draft_weights and arguments.weights:
        raise UserError("--draft_weights does not go with --weights, whose drafts are in int8 already")
    return name


def _make_strategy(arguments: Arguments, name: str, num_layers: int) -> "Strategy":
    from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative

    if name == "autoregressive":
        return Autoregressive()
    exit_layer: Any = shared.choose_exit_layer(arguments, num_layers)
    if name == "early_exit":
        return EarlyExit(exit_layer)
    return SelfSpeculative(
        exit_layer,
        arguments.num_speculations,
        arguments.draft_weights,
        arguments.lookup,
        draft_vocabulary=arguments.draft_vocabulary,
    )


def _stream(
    model: "Model",
    prompt: "Prompt",
    strategy: "Strategy",
    request: "GenerationConfig",
    prompt_text: str,
    write: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Prints the continuation of one prompt as it is decoded, then a line of figures."""
    from lsjax.generation import stream

    began = time.perf_counter()
    pieces = stream(
        model,
        [prompt],
        max_new_tokens=request.max_new_tokens,
        strategy=strategy,
        sampling=request.sampling,
        seed=request.seed,
        stop=request.stop,
    )
    compiled = time.perf_counter()
    first = next(pieces)  # there always is one: the prompt's last token predicts a token
    first_token = time.perf_counter()
    received = [first]
    print(first.text, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        received.append(piece)
    seconds = time.perf_counter() - first_token
    print(flush=True)
    tokens = [token for piece in received for token in piece.tokens]
    stats = received[-1].stats or {}
    if write:
        write(_result(prompt_text, "".join(piece.text for piece in received), tokens, stats))
    rate = f"{(len(tokens) - len(first.tokens)) / seconds:.1f} tokens/s, " if len(received) > 1 else ""
    print(f"{len(tokens)} tokens, {rate}{_describe([stats])}, compiled in {compiled - began:.1f} s", flush=True)


def _generate_all(
    model: "Model",
    prompts: list["Prompt"],
    strategy: "Strategy",
    request: "GenerationConfig",
    texts: list[str],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Writes the result of each prompt when it has ended; progress goes to standard error."""
    from lsjax.generation import generate_in_turn

    began = time.perf_counter()
    results = generate_in_turn(model, prompts, request, strategy)
    compiled = last_note = time.perf_counter()
    all_stats, num_tokens = [], 0
    for result in results:
        write(_result(texts[result.index], result.text, result.tokens, result.stats))
        all_stats.append(result.stats)
        num_tokens += len(result.tokens)
        now = time.perf_counter()
        if now - last_note >= _SECONDS_BETWEEN_NOTES:
            last_note = now
            _note(_progress(len(all_stats), len(texts), num_tokens, now - compiled))
    rate = num_tokens / (time.perf_counter() - compiled)
    figures = f"{len(texts)} prompts, {num_tokens} tokens, {rate:.1f} tokens/s with prefill, {_describe(all_stats)}"
    _note(f"{figures}, compiled in {compiled - began:.1f} s")


def _progress(done: int, total: int, num_tokens: int, seconds: float) -> str:
    from lsjax.training.progress import format_duration

    remaining = format_duration(seconds / done * (total - done))
    return f"{done}/{total} prompts, {num_tokens / seconds:.1f} tokens/s, ETA {remaining}"


def _describe(all_stats: Sequence[dict[str, Any]]) -> str:
    """Returns the strategy, its setting, and the share of drafts that were accepted."""
    from lsjax.decoding.strategies import drafts_label

    setting = all_stats[0]
    parts = [
        setting["strategy"],
        f"exit layer {setting['exit_layer']}" if setting["exit_layer"] else "",
        drafts_label(setting) if setting["num_speculations"] else "",
        f"{setting['lookup']} copied" if setting["lookup"] else "",
    ]
    drafted, accepted = (sum(stats[key] for stats in all_stats) for key in ("drafted", "accepted"))
    parts.append(f"{accepted / drafted:.0%} of drafts accepted" if drafted else "")
    return ", ".join(part for part in parts if part)


def _result(prompt: str, text: str, tokens: list[int], stats: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of one prompt."""
    rest = {key: value for key, value in stats.items() if key != "finish_reason"}
    return {
        "prompt": prompt,
        "text": text,
        "tokens": tokens,
        "finish_reason": stats["finish_reason"],
        "stats": rest,
    }


def _line_writer(path: str | None) -> Callable[[dict[str, Any]], None] | None:
    """Returns a function that appends a record as a line to the new file `path`; None without a path.

    Raises UserError when the file cannot be written or holds something.
    """
    if path is None:
        return None
    from lsjax.files import check_writable, disk_path

    check_writable(disk_path(path, "--output"), "--output")
    if os.path.exists(path) and os.path.getsize(path):
        raise UserError(f"--output {path} holds something already: give a new file, or move it away")

    def write(record: dict[str, Any]) -> None:
        _append_line(path, json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")

    return write


def _append_line(path: str, line: bytes) -> None:
    """Appends a whole line or nothing: it is one write, which a full disk undoes."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            if os.write(file, line) == len(line):
                return
            reason = "the disk is full"
        except OSError as error:
            reason = error.strerror
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise UserError(f"cannot write --output {path}: {reason}; it holds the results so far")
    finally:
        os.close(file)


def _print_line(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
