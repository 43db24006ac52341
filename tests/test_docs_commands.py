"""Every command in README and in the pages exists, and so does every flag, configuration and key in it."""

import functools
import importlib
import re
import shlex
from typing import NamedTuple

import pytest

from lsjax.cli.flags import CommandFlags
from lsjax.cli.main import COMMANDS as COMMAND_NAMES
from lsjax.cli.main import main
from lsjax.config import Config
from lsjax.training.loop import train
from tests.helpers.pages import PAGES, ROOT, keys_of, text_of

END_OF_COMMAND = re.compile(r"[;&|]+|done|then|fi")


class Command(NamedTuple):
    """One command of lsjax as a page writes it."""

    page: str
    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.name} {' '.join(self.arguments)}"


def words_of(code: str) -> list[str]:
    """Returns the words of shell code, with ";" at the end of each line. Comments are left out."""
    lexer = shlex.shlex(
        re.sub(r"\\\n", " ", code).replace("$'", "'").replace("\n", " ;\n"), posix=True, punctuation_chars=";&|"
    )
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)


def commands_in(code: str, page: str) -> list[Command]:
    """Returns the commands in shell code: `lsjax NAME ...` and `python launch/NAME.py ...`, also inside quotes."""
    found, words = [], words_of(re.sub(r"(?m)#.*$", "", code))
    for at, word in enumerate(words):
        if " " in word.strip() and ("launch/" in word or "lsjax " in word):
            found += commands_in(word, page)
        script = re.fullmatch(r"launch/([a-z_]+)\.py", word)
        if script:
            name, rest = script.group(1), words[at + 1 :]
        elif word == "lsjax" and at + 1 < len(words) and (at == 0 or words[at - 1] != "cd"):
            name, rest = words[at + 1], words[at + 2 :]
        else:
            continue
        end = next((i for i, other in enumerate(rest) if END_OF_COMMAND.fullmatch(other)), len(rest))
        found.append(Command(page, name, tuple(rest[:end])))
    return found


def all_commands() -> list[Command]:
    found = []
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), text_of(page)
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        blocks = [code for language, code in fenced if not language]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        inline = [
            code for code in re.findall(r"`([^`]+)`", prose) if re.match(r"lsjax \w|(?:python )?launch/\w+\.py", code)
        ]
        for code in blocks + inline:
            found += commands_in(code, name)
    return found


COMMANDS = all_commands()


@functools.cache
def flag_names(name: str) -> set[str]:
    """Returns the flags of a command, without those that set keys of a configuration."""
    return set(re.findall(r"^  --([a-z_]+)", defined_flags(name).help_text(), flags=re.MULTILINE))


def defined_flags(name: str) -> CommandFlags:
    """Returns the flags that a command defines."""
    assert name in COMMAND_NAMES, f"there is no command {name}"
    flags = CommandFlags()
    importlib.import_module(f"lsjax.cli.{name}").define_flags(flags)
    return flags


def test_every_command_of_lsjax_is_in_the_pages():
    assert {command.name for command in COMMANDS} == {*COMMAND_NAMES, "--help"}
    assert len(COMMANDS) >= 40


def test_commands_are_taken_apart():
    remote = "gcloud x --command='\n cd lsjax && .venv/bin/python launch/train.py --a \\\n  --b'\n"
    code = remote + "lsjax decode --stop=$'x'  # a comment\n"
    assert commands_in(code, "p") == [("p", "train", ("--a", "--b")), ("p", "decode", ("--stop=x",))]
    assert commands_in("for r in 0 1; do python launch/a.py --x &\ndone; wait", "p") == [("p", "a", ("--x",))]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_parse(command):
    if command.name == "--help":
        assert main(["--help"]) == 0
        return
    flags = defined_flags(command.name)
    if not command.arguments:  # a page names the command
        return
    arguments = flags.parse([re.sub(r"=(my_config\.py|NAME)$", "=demo", argument) for argument in complete(command)])
    if "config" in flag_names(command.name):
        arguments.read_config()


def complete(command: Command) -> list[str]:
    """Returns the arguments with numbers for shell variables, and with the flags that a text in prose leaves out."""
    given = [re.sub(r"\$\w+$", "1", argument) for argument in command.arguments]
    required = {"train": ["config", "workdir"], "compile_ahead": ["config", "topology"]}.get(command.name, [])
    names = {argument.removeprefix("--").partition("=")[0] for argument in given}
    return given + [f"--{name}=demo" for name in required if name not in names]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_prose_exist(page):
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    known = set().union(*map(flag_names, COMMAND_NAMES)) | {"worker"}  # the last one is gcloud's
    for code in re.findall(r"`(--[^`]+)`", prose):
        flag = re.match(r"--([a-zA-Z0-9_.]+)", code).group(1)
        if flag.startswith("config."):
            assert flag.removeprefix("config.") in keys_of(Config().to_dict()), code
        else:
            assert flag in known, f"{page.name} names {code}"


@pytest.mark.slow
def test_commands_of_the_pages_run(tiny_run, tmp_path, monkeypatch, capsys):
    """Runs what the pages say about generate, convert and decode, on a model made here."""
    train(tiny_run, tmp_path / "runs" / "demo", verbose=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f("}\n{"prompt": "import os"}\n')
    page = "docs/decoding.md"
    for command in COMMANDS:
        if command.page == page and command.name == "generate" and command.arguments:
            assert main(["generate", *command.arguments, "--max_new_tokens=4"]) == 0
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2
    (hand_back,) = [command for command in COMMANDS if command.page == "README.md" and command.name == "convert"]
    (tmp_path / "runs" / "smollm2").symlink_to("demo")
    assert main(["convert", *hand_back.arguments]) == 0
    assert (tmp_path / "runs" / "smollm2-hf" / "model.safetensors").is_file()
    decodings = [command for command in COMMANDS if command.page == page and command.name == "decode"]
    first = next(c for c in decodings if c.arguments and "draft_vocabulary" not in str(c))  # no list is made here
    assert (
        main(["decode", *first.arguments, "--repeats=1", "--num_prompts=1", "--max_new_tokens=4", "--prompt_tokens=4"])
        == 0
    )
    assert (tmp_path / "report.json").is_file()
