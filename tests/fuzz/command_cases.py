"""Bad flags and bad files for every command, in this process."""

import functools
import importlib
import importlib.util
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import mutations
from tests.fuzz.harness import Case, Exit
from tests.fuzz.parts import TINY_CONFIG_FILE

# Good arguments of each command; {name} stands for a part, {run} for a folder that does not exist yet.
GOOD: dict[str, list[str]] = {
    "generate": ["--model={huggingface}", "--prompt=def main():", "--max_new_tokens=2"],
    "decode": ["--model={huggingface}", "--prompt=def main():", "--max_new_tokens=2", "--repeats=1"],
    "explain": ["--model={huggingface}", "--prompt=def main():", "--max_new_tokens=2"],
    "draft_vocabulary": ["--model={huggingface}"],
    "convert": ["--from={huggingface}", "--to={run}"],
    "train": ["--config={tiny}", "--workdir={run}"],
    "compile_ahead": ["--config={tiny}", "--topology=tpu:v5p:2x2x1"],
    "ablate": ["--config={tiny}", "--workdir={run}"],
    "demo": ["--config={tiny}", "--workdir={run}"],
    "demo_pretrained": ["--config={tiny}", "--workdir={run}"],
    "benchmark_training": ["--config={tiny}", "--steps=1"],
    "benchmark_kernels": ["--rows=1", "--tokens=1", "--lengths=16", "--capacity=32", "--repeats=1"],
    "prepare": ["--config={tiny}", "--workdir={run}"],
    "evaluate": ["--model={huggingface}"],
    "tune": ["--model={huggingface}", "--max_new_tokens=2"],
}

NUMBERS = ("abc", "", "1.5.2", "0x", "1,2", "\u0663\u0664x", "nan", "9" * 30, "-" + "9" * 30, "1e5", "None", "--")
FLOATS = ("abc", "", "nan", "inf", "-inf", "-1", "1,5", "1e999", "0x1p3q", "None")
WORDS = ("", "some", "AUTO ", "int8,int8", "\udcff", "x" * 3000, "1")
PATHS = ("", "\udcff", "x" * 300, "/proc/self/mem/x", "/dev/null/x", "{tiny}/x", "y/" * 2500)
LISTS = (",", "1,,2", "a,b", "1;2", "-1", "0", "nan", "9" * 30, " ", "\udcff")

# A file that holds something else, a device, and a file of the system.
NO_OUTPUTS = ("{tiny}", "/dev/null", "/proc/self/comm")

CONFIG_VALUES = (
    "--config.model.width=abc", "--config.model.width=-8", "--config.model.width=1.5", "--config.model.widht=8",
    "--config.nothing=1", "--config.model=3", "--config.training.seed=4294967296", "--config.training.seed=-1",
    "--config.training.learning_rate=nan", "--config.training.learning_rate=inf", "--config.model.rope_theta=1e999",
    "--config.training.total_steps=0", "--config.training.batch_size=7.5", "--config.data.file_pattern=**.txt",
    "--config.data.corpus=", "--config.data.corpus={run}/nowhere", "--config.mesh.data=0", "--config.mesh.tensor=5",
    "--config.layerskip.exit_curriculum=some", "--config.checkpoint.keep=0", "--config.initial_model={run}/nowhere",
    "--config.model.tie_embeddings=maybe", "--config.model.num_kv_heads=3", "--config.data.tokenizer={run}/nowhere",
    "--config.training.frozen=nothing_of_that_name", "--config.training.sequence_length=999999999",
    "--config.model.rope_scaling.kind=yarn", "--config.layerskip.dropout_max_rate=1.5", "--config.=1", "--config",
)  # fmt: skip

CONFIG_FILES = ("{run}/nowhere.py", "", "/proc", "demo.toml", "\udcff", "demmo", "demo:3", "x" * 300)

COMMON = (
    ["stray"], ["--frobnicate=1"], ["-x"], ["--=3"], ["--flagfile={run}/nowhere"],
    ["--model"], ["\udcff"], [""], ["--help=maybe"],
)  # fmt: skip


def command_cases() -> list[Case]:
    """Returns all bad flags and bad files of the commands."""
    from lsjax.cli.main import COMMANDS

    return [case for name in COMMANDS for case in (*flag_cases(name), *common_cases(name))] + list(file_cases())


def flag_cases(command: str) -> Iterator[Case]:
    """Gives each flag of a command a few values that are not for it."""
    from lsjax.cli.flags import CommandFlags

    defined = CommandFlags()
    importlib.import_module(f"lsjax.cli.{command}").define_flags(defined)
    rng = random.Random(command)
    values = defined._values
    for name in values:
        kind = values[name].flag_type()
        bad = {"int": NUMBERS, "float": FLOATS, "number or auto": NUMBERS, "string enum": WORDS, "path": PATHS,
               "comma separated list of strings": LISTS}.get(kind, ())  # fmt: skip
        for value in rng.sample(bad, min(4, len(bad))):
            yield command_case(f"{command} --{name}={value[:20]!r}", command, [*GOOD[command], f"--{name}={value}"])
        if name in ("report", "output"):
            for value in NO_OUTPUTS[: 1 if command == "generate" else None]:
                yield command_case(f"{command} --{name}={value}", command, [*GOOD[command], f"--{name}={value}"])
        if kind == "bool":
            yield command_case(f"{command} --{name}=maybe", command, [*GOOD[command], f"--{name}=maybe"])
    if any("{tiny}" in argument for argument in GOOD[command]):
        for argument in rng.sample(CONFIG_VALUES, 30 if command == "train" else 4):
            yield command_case(f"{command} {argument}", command, [*GOOD[command], argument])
        for value in rng.sample(
            ("{run}/nowhere.py", "", "/proc", "demo.toml", "\udcff", "demmo", "demo:3", "x" * 300), 4
        ):
            yield command_case(f"{command} --config={value[:20]!r}", command, [*GOOD[command], f"--config={value}"])


def common_cases(command: str) -> Iterator[Case]:
    """Gives a command arguments that no command has, and too few of its own."""
    rng = random.Random(f"{command} common")
    for extra in rng.sample(COMMON, 4):
        yield command_case(f"{command} {extra[0]!r}", command, [*GOOD[command], *extra])
    first, *others = GOOD[command]
    without_value = [*others, first.partition("=")[0], "--nothing=1"]
    yield command_case(f"{command} with its first flag without a value", command, without_value)
    if command in ("generate", "decode", "convert", "train", "compile_ahead"):  # the others have defaults
        yield command_case(f"{command} without its first argument", command, GOOD[command][1:])


def file_cases() -> Iterator[Case]:
    """Gives commands damaged models, prompts and configuration files."""
    rng = random.Random(21)
    models = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
    for command in ("generate", "decode", "convert"):
        for file in models:
            for name in rng.sample(sorted(mutations.WHOLE_FILE), 2):
                damage = mutations.WHOLE_FILE[name]
                yield _damaged_model(f"{command} of a model whose {file} is {name}", command, file, damage)
    for name, damage in mutations.WHOLE_FILE.items():
        yield Case(f"generate --prompts={name}", functools.partial(_damaged_prompts, damage=damage), succeeded, False)
    programs = {
        "a syntax error": "def get_config(:", "no get_config": "x = 1", "an exception": "raise ValueError('no')",
        "a number": "def get_config():\n    return 3", "nothing": "",
        "an endless recursion": "def get_config():\n    return get_config()", "null bytes": "\0",
        "a missing import": "import nothing_of_that_name",
        "a key too many": TINY_CONFIG_FILE.replace("{corpus!r}", "''").replace("return", "config.modle = 3; return"),
        "a dict": "def get_config():\n    return {'model': {}}", "several lines": "raise ValueError('a\\nb\\nc')",
        "an exception without a word": "raise Exception",
    }  # fmt: skip
    for name, text in programs.items():
        yield Case(f"train --config={name}", functools.partial(_config_program, text=text), None)


def command_case(name: str, command: str, arguments: list[str]) -> Case:
    """Returns a case that must end with exit status 2 and one line."""
    return Case(name, functools.partial(_run, command=command, arguments=arguments), None)


def _run(parts: Any, watch: Any, command: str, arguments: list[str]) -> Exit:
    from lsjax.cli.main import run_command

    tiny = watch.folder / "tiny.py"
    tiny.write_text(TINY_CONFIG_FILE.format(corpus=str(parts.corpus)))
    watch.prepared()
    known = {"huggingface": parts.huggingface, "tiny": tiny, "run": watch.folder / "run"}
    given = [_fill(argument, known) for argument in arguments]
    return Exit(run_command(command, given, program=f"lsjax {command}", call=f"lsjax {command}"))


def _fill(argument: str, known: dict[str, Path]) -> str:
    for name, path in known.items():
        argument = argument.replace(f"{{{name}}}", str(path))
    return argument


def succeeded(_: Any, result: Exit) -> None:
    """Accepts a command that took a harmless damage in its stride."""
    assert result.status == 0


def _damaged_model(name: str, command: str, file: str, damage: mutations.Damage) -> Case:
    def call(parts, watch):
        model = watch.folder / "model"
        shutil.copytree(parts.huggingface, model)
        damage(model / file)
        arguments = [argument.replace("{huggingface}", str(model)) for argument in GOOD[command]]
        return _run(parts, watch, command, arguments)

    return Case(name, call, succeeded, quiet=False, outputs=("run",))


def _damaged_prompts(parts: Any, watch: Any, damage: mutations.Damage) -> Exit:
    path = watch.folder / "prompts.jsonl"
    shutil.copy(parts.prompts, path)
    damage(path)
    arguments = ["--model={huggingface}", f"--prompts={path}", "--max_new_tokens=2"]
    return _run(parts, watch, "generate", arguments)


def _config_program(parts: Any, watch: Any, text: str) -> Exit:
    path = watch.folder / "program.py"
    path.write_text(text)
    return _run(parts, watch, "train", [f"--config={path}", "--workdir={run}"])
