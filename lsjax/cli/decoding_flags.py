"""Flags that generate and decode share, and what they mean: the model, the prompts, strategies and sampling."""

import sys
from typing import TYPE_CHECKING

from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError
from lsjax.files import path_of

if TYPE_CHECKING:
    from lsjax.benchmarks.prompts import PromptLine
    from lsjax.decoding.batch import Prompt
    from lsjax.decoding.model import Model
    from lsjax.decoding.strategies import Sampling

STRATEGIES = ("autoregressive", "early_exit", "self_speculative")
_PROMPTS_HELP = 'A .jsonl file with one {"prompt": TEXT} per line.'
DRAFT_FLAGS = ("num_speculations", "lookup", "draft_weights", "draft_vocabulary")


def define_model(flags: CommandFlags) -> None:
    """Defines --model and --adapter."""
    flags.path(
        "model",
        None,
        "Training workdir, Hugging Face folder, GGUF file or Hub name: org/name[@revision][:FILE.gguf].",
        required=True,
    )
    define_adapter(flags)


def define_adapter(flags: CommandFlags) -> None:
    """Defines --adapter."""
    flags.path("adapter", None, "LoRA adapter to merge into the model: a folder of PEFT, or the workdir of a run.")


def define_model_and_prompts(flags: CommandFlags, prompts_help: str = _PROMPTS_HELP) -> None:
    """Defines --model, --adapter, --prompt, --prompts and --chat."""
    define_model(flags)
    flags.text("prompt", None, "One prompt.")
    flags.path("prompts", None, prompts_help)
    flags.switch("chat", "Put each prompt into the model's chat template, as a user's message.")


def define_held_out_prompts(flags: CommandFlags) -> None:
    """Defines the flags that choose prompts from held-out text, for a command that needs none to be given."""
    flags.integer("num_prompts", 8, "Held-out prompts to take when none are given.", at_least=1)
    flags.integer("prompt_tokens", 64, "Length of the held-out prompts.", at_least=1)


def define_setting(flags: CommandFlags) -> None:
    """Defines the flags that set a strategy."""
    flags.integer_or_auto(
        "exit_layer",
        None,
        "E: early layers that draft, or auto: those predicted to be fastest. Default: the draft exit that the model "
        "was trained with; without one, a quarter of the layers.",
    )
    flags.integer_or_auto("num_speculations", 4, "d: tokens drafted per round, or auto.")
    flags.integer(
        "lookup", 0, "Where the text repeats itself, copy this many drafts from it. --num_speculations may then be 0."
    )
    flags.choice(
        "draft_weights", None, ["int8"], "Draft with int8 copies of the early layers; all layers verify, as they are."
    )
    flags.integer_or_path(
        "draft_vocabulary",
        None,
        "Draft the N most frequent tokens only, by the list beside the model (lsjax draft_vocabulary makes it), or the "
        "tokens of a list in a file only.",
    )


def define_sampling(flags: CommandFlags) -> None:
    """Defines the flags that say how tokens are drawn and what ends a text."""
    flags.integer("max_new_tokens", 64, "Most tokens to generate per prompt.")
    flags.number("temperature", 0.0, "0 is greedy; above 0, tokens are drawn.")
    flags.integer("top_k", 0, "Draw from the k likeliest tokens only; 0: from all.")
    flags.number("top_p", 1.0, "Draw from the fewest tokens that together have this probability.")
    flags.integer("seed", 0, "Other seeds draw other texts.", at_least=0)
    flags.repeated("stop", "A text that ends a continuation, just before it; may be given repeatedly.")


def define_hardware(flags: CommandFlags) -> None:
    """Defines the flags that say how the model is held and computed."""
    flags.choice("weights", None, ["int8"], "Round the weights to int8: another model, in half the bytes of bfloat16.")
    flags.choice(
        "cache", "auto", ["auto", "int8"], "KV cache in the compute dtype, or in int8: half the bytes of bfloat16."
    )
    flags.choice(
        "kernels", "auto", ["auto", "on", "off"], "Pallas kernels for the KV cache; auto: where they move fewer bytes."
    )
    flags.integer("tensor", 1, "Devices to split the model over (tensor parallelism).")


def load_model(arguments: Arguments) -> "Model":
    """Loads the model of --model, laid out for decoding."""
    from lsjax.decoding.model import load

    return load(
        arguments.model,
        for_decoding=True,
        weights=arguments.weights,
        cache=arguments.cache,
        kernels=arguments.kernels,
        tensor=arguments.tensor,
        adapter=arguments.adapter,
    )


def read_sampling(arguments: Arguments) -> "Sampling":
    """Returns the sampling settings; says on standard error when --seed has no effect."""
    from lsjax.decoding.strategies import Sampling

    if arguments.seed and not arguments.temperature:
        print("--seed has no effect: decoding is greedy at --temperature=0", file=sys.stderr)
    return Sampling(arguments.temperature, arguments.top_k, arguments.top_p)


def given_prompts(arguments: Arguments) -> "list[PromptLine]":
    """Returns the text of --prompt or the lines of --prompts; none when neither is given."""
    from lsjax.benchmarks.prompts import PromptLine, read_prompt_lines

    if arguments.prompt is not None and arguments.prompts is not None:
        raise UserError("give --prompt or --prompts, not both")
    if arguments.prompt is not None:
        return [PromptLine(arguments.prompt, "--prompt", {})]
    return read_prompt_lines(path_of(arguments.prompts)) if arguments.prompts is not None else []


def check_held_out_prompts(arguments: Arguments) -> None:
    """Raises UserError for flags about held-out prompts beside given ones, and for --chat without given ones."""
    if arguments.prompt is not None or arguments.prompts is not None:
        arguments.refuse(["num_prompts", "prompt_tokens"], "they choose held-out prompts, and prompts are given")
    elif arguments.chat:
        raise UserError("--chat needs --prompt or --prompts")


def without_settings(line: "PromptLine", command: str) -> str:
    """Returns the prompt of a line. Raises UserError when the line holds settings of its own."""
    from lsjax.cli.requests import SETTINGS

    own = [key for key in SETTINGS if key in line.row]
    if own:
        raise UserError(
            f'{line.place}: "{own[0]}" is for `lsjax generate`: {command} measures all prompts with the settings of '
            "its flags"
        )
    return line.prompt


def held_out_prompts(arguments: Arguments) -> list[list[int]]:
    """Returns prompts from the text that the training run of --model held out."""
    from lsjax.benchmarks.prompts import held_out_prompts

    return held_out_prompts(path_of(arguments.model), arguments.num_prompts, arguments.prompt_tokens)


def make_prompts(arguments: Arguments, model: "Model", texts: list[str]) -> list["Prompt"]:
    """Returns the prompts to decode: the texts, or with --chat their tokens inside the model's chat template."""
    if not arguments.chat:
        return list(texts)
    return [model.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]


def trained_draft_exit(arguments: Arguments) -> int | None:
    """Returns the draft exit that the run of --adapter or --model was trained with, or None when there is none."""
    from lsjax.io import workdir

    path = path_of(arguments.adapter or arguments.model)
    return (workdir.read_config(path).layerskip.draft_exit or None) if workdir.is_run(path) else None


def choose_exit_layer(arguments: Arguments, num_layers: int) -> int | str:
    """Returns --exit_layer, or else the draft exit that the model was trained with, or else a quarter of the layers."""
    if arguments.exit_layer is not None:
        return arguments.exit_layer
    return trained_draft_exit(arguments) or max(1, num_layers // 4)
