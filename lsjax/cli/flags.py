"""Flags of a command: absl flags in named groups, apart from absl's global ones, and the text of --help.

Every run of a command makes its flags anew, so commands can be run one after another in one process.
"""

import difflib
import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from lsjax.checks import MAX_INTEGER, MAX_SEED
from lsjax.cli.configs import find_config
from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.files import as_path

HELP = ("--help", "-help", "-h")
CONFIG = "config"

_NO_CONFIG = "get_config() of the file of --config returns nothing; it must return a ConfigDict"
_REPEATED = 'The last value of a flag counts, so a script may set defaults before "$@".'
_WIDTH = 79
_ABSL_FLAGS = ("flagfile", "undefok")
_COLUMN = 28  # where the help of a flag begins


class Arguments:
    """The values of a command's flags: `arguments.batch_size` is the value of --batch_size."""

    def __init__(self, values: flags.FlagValues):
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self._values[name].value

    def given(self, name: str) -> bool:
        """Returns whether a flag was given on the command line."""
        return bool(self._values[name].present)

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns the numbers of a flag that holds a list. Raises UserError when one is not a number."""
        texts: Sequence[str] = self._values[name].value or ()
        try:
            numbers = tuple(int(text) for text in texts)
        except ValueError:
            raise UserError(f"--{name} must be numbers separated by commas, got {','.join(texts)!r}") from None
        if numbers and max(numbers) > MAX_INTEGER:
            raise UserError(f"--{name} must be numbers of at most {MAX_INTEGER}, got {max(numbers)}")
        return numbers

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Raises UserError, with `reason` in it, when one of the flags `names` was given."""
        for name in names:
            if self.given(name):
                raise UserError(f"--{name} has no effect here: {reason}")

    def read_config(self) -> Config:
        """Returns the checked configuration of --config. Raises UserError when its file is missing or wrong."""
        try:
            config = self._values[CONFIG].value
            tree = None if config is None else config.to_dict()
        except Exception as error:  # a configuration file is a program: it may raise anything
            raise UserError(f"cannot load the file of --{CONFIG}: {error.__cause__ or error}") from None
        if tree is None:
            raise UserError(_NO_CONFIG)
        return Config.from_dict(tree)


class CommandFlags:
    """The flags that a command defines, in groups."""

    def __init__(self) -> None:
        self._values = flags.FlagValues()
        self._groups: dict[str, list[tuple[str, str]]] = {}
        self._required: list[str] = []
        self._config_default: str | None = None

    def group(self, title: str) -> None:
        """Begins a group: the flags that follow are listed under `title`."""
        self._lines = self._groups.setdefault(title, [])

    def text(self, name: str, default: str | None, help: str, required: bool = False) -> None:
        """Defines a flag that takes a text."""
        flags.DEFINE_string(name, default, help, self._values)
        self._add(name, "TEXT", help, default, required)

    def path(self, name: str, default: str | None, help: str, required: bool = False) -> None:
        """Defines a flag that takes a path; a leading ~ stands for the home folder."""
        flags.DEFINE(_PathParser(), name, default, help, self._values)
        self._add(name, "PATH", help, default, required)

    def switch(self, name: str, help: str) -> None:
        """Defines a flag that is off unless it is given."""
        flags.DEFINE_boolean(name, False, help, self._values)
        self._add(name, "", help, None, False)

    def integer(self, name: str, default: int | None, help: str, at_least: int | None = None) -> None:
        """Defines a flag that takes a whole number."""
        most = MAX_SEED if name == "seed" else MAX_INTEGER
        flags.DEFINE_integer(name, default, help, lower_bound=at_least, upper_bound=most, flag_values=self._values)
        self._add(name, "N", help, default, False)

    def number(self, name: str, default: float, help: str) -> None:
        """Defines a flag that takes a number."""
        flags.DEFINE_float(name, default, help, flag_values=self._values)
        self._add(name, "X", help, default, False)

    def integer_or_auto(self, name: str, default: int | None, help: str) -> None:
        """Defines a flag that takes a whole number or "auto"."""
        flags.DEFINE(_IntegerOrAutoParser(), name, default, help, self._values)
        self._add(name, "N|auto", help, default, False)

    def integer_or_path(self, name: str, default: int | None, help: str) -> None:
        """Defines a flag that takes a whole number or a path."""
        flags.DEFINE(_IntegerOrPathParser(), name, default, help, self._values)
        self._add(name, "N|PATH", help, default, False)

    def choice(self, name: str, default: str | None, choices: Sequence[str], help: str) -> None:
        """Defines a flag that takes one of some words."""
        flags.DEFINE_enum(name, default, choices, help, self._values)
        self._add(name, "|".join(choices), help, default, False)

    def comma_list(self, name: str, default: str, help: str) -> None:
        """Defines a flag that takes values separated by commas."""
        flags.DEFINE_list(name, default, help, self._values)
        self._add(name, "A,B,...", help, default, False)

    def repeated(self, name: str, help: str) -> None:
        """Defines a flag that takes a text and may be given several times."""
        flags.DEFINE_multi_string(name, [], help, self._values)
        self._add(name, "TEXT", help, None, False)

    def config(self, default: str | None = None) -> None:
        """Defines --config, and --config.KEY for each key of the configuration; required unless it has a default."""
        self._config_default = default
        self._add(CONFIG, "NAME", "A configuration file, or the name of one that ships.", default, default is None)
        self._lines.append(("--config.SECTION.KEY=VALUE", "Sets one key of the configuration."))

    def _add(self, name: str, metavar: str, help: str, default: Any, required: bool) -> None:
        if required:
            self._required.append(name)
        extra = " (required)" if required else f" (default: {default})" if default not in (None, "") else ""
        self._lines.append((f"--{name}={metavar}" if metavar else f"--{name}", help + extra))

    def parse(self, arguments: Sequence[str]) -> Arguments:
        """Returns the values of the flags in `arguments`. Raises UserError that names the first wrong one."""
        arguments = list(arguments)
        self._check_values(arguments)
        try:
            if self._config_default is not None or CONFIG in self._required:
                arguments = self._with_config(arguments)
            rest = self._values(["", *arguments])
        except UserError:
            raise
        except (AttributeError, KeyError) as error:  # ml_collections, for a key that the configuration does not have
            detail = re.sub(r"(?:\\n|[\n'\\])+", " ", str(error.args[0])).strip() if error.args else ""
            if "get_config" in detail:
                raise UserError("the file of --config has no function get_config() that returns a ConfigDict") from None
            raise UserError(f"unknown config key {detail} (lsjax/config.py lists them all)") from None
        except flags.UnrecognizedFlagError as error:
            raise UserError(f"unknown flag --{error.flagname}{self._nearest(error.flagname)}") from None
        except flags.Error as error:
            raise UserError(f"{_last_line(error)} (see --help)") from None
        except Exception as error:  # a configuration file is a program: it may raise anything
            message = f"the configuration cannot be read: {type(error).__name__}: {_last_line(error)} (see --help)"
            raise UserError(message) from None
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; every option is --name=value (see --help)")
        missing = [f"--{name}=..." for name in self._required if self._values[name].value is None]
        if f"--{CONFIG}=..." in missing and any(a.startswith(f"--{CONFIG}") for a in arguments):
            raise UserError(_NO_CONFIG)
        if missing:
            raise UserError(f"give {' and '.join(missing)} (see --help)")
        return Arguments(self._values)

    def _check_values(self, arguments: Sequence[str]) -> None:
        """Raises UserError for a flag without a value, before absl takes the flag that follows it for one.

        It also raises for absl's own flags, which read flags from any file or let an unknown flag pass.
        """
        for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
            name = argument.lstrip("-")
            if argument.startswith("-") and name.partition("=")[0] in _ABSL_FLAGS:
                raise UserError(f"unknown flag --{name.partition('=')[0]} (see --help)")
            is_flag = argument.startswith("-") and name in self._values and not self._values[name].boolean
            if (is_flag or argument == f"--{CONFIG}") and following.startswith("--"):
                raise UserError(f"--{name} has no value: write --{name}=... (see --help)")

    def _with_config(self, arguments: list[str]) -> list[str]:
        """Returns the arguments with the path of the last --config first, and defines --config.

        ml_collections wants the file before its keys, and a later file would undo keys that stand before it.
        """
        rest, value = [], self._config_default
        words = iter(arguments)
        for word in words:
            flag, equals, text = word.partition("=")
            if flag in (f"--{CONFIG}", f"-{CONFIG}"):
                value = text if equals else next(words, "")
            else:
                rest.append(word)
        arguments = rest if value is None else [f"--{CONFIG}={find_config(value)}", *rest]
        # ml_collections keeps the file as a module, and would find an earlier file's get_config in a process that runs
        # several commands.
        sys.modules.pop(f"{CONFIG}_config", None)
        # ml_collections looks for --config.KEY in the arguments before it parses them.
        config_flags.DEFINE_config_file(CONFIG, flag_values=self._values, lock_config=True, sys_argv=arguments)
        return arguments

    def _nearest(self, name: str) -> str:
        close = difflib.get_close_matches(name, [n for n in self._values if "." not in n], n=1)
        return f"; did you mean --{close[0]}?" if close else " (see --help)"

    def help_text(self) -> str:
        """Returns the groups of flags, one flag per line or paragraph, within 79 columns."""
        groups = ["\n".join([title, *map(_flag_lines, lines)]) for title, lines in self._groups.items()]
        return "\n\n".join([*groups, _REPEATED])


def _flag_lines(line: tuple[str, str]) -> str:
    flag, help = line
    indent = " " * _COLUMN
    wrapped = textwrap.wrap(help, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    start = f"  {flag}"
    if len(start) + 1 > _COLUMN:
        return "\n".join([start, *wrapped])
    return "\n".join([f"{start:{_COLUMN}}{wrapped[0].strip()}", *wrapped[1:]])


def fill_paragraphs(text: str) -> str:
    """Returns a text with its paragraphs filled to 79 columns; indented lines, which are examples, stay."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(
        block if block.startswith(" ") else textwrap.fill(block, _WIDTH, break_on_hyphens=False) for block in blocks
    )


def _last_line(error: Exception) -> str:
    """Returns the last line of a message: ml_collections puts whole tracebacks before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("an empty text is no path")
        try:
            return str(as_path(argument, "the value"))
        except UserError as error:
            raise ValueError(str(error)) from None

    def flag_type(self) -> str:
        return "path"


class _IntegerOrPathParser(flags.ArgumentParser):
    syntactic_help = "a number, or a path"

    def parse(self, argument: str | int) -> str | int:
        try:
            return int(argument)
        except ValueError:
            return _PathParser().parse(str(argument))

    def flag_type(self) -> str:
        return "number or path"


class _IntegerOrAutoParser(flags.ArgumentParser):
    syntactic_help = 'a number, or "auto"'

    def parse(self, argument: str | int) -> str | int:
        try:
            return "auto" if argument == "auto" else int(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is neither a number nor auto") from None

    def flag_type(self) -> str:
        return "number or auto"
