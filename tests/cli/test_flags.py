"""Flags: groups in --help, paths, lists, required flags, configurations by name; every wrong value is one line."""

import re

import pytest

from lsjax.cli.configs import config_names, configs_folder, find_config
from lsjax.cli.flags import CommandFlags
from lsjax.errors import UserError


@pytest.fixture
def flags():
    flags = CommandFlags()
    flags.group("First")
    flags.path("model", None, "Where the model is.", required=True)
    flags.comma_list("sizes", "1,2", "Sizes to try.")
    flags.group("Second")
    flags.integer_or_auto("exit_layer", None, "A layer, or auto. " * 10)
    flags.switch("chat", "Talk.")
    return flags


def test_values_are_attributes(flags):
    arguments = flags.parse(["--model=x", "--exit_layer=auto", "--chat"])
    assert (arguments.model, arguments.exit_layer, arguments.chat) == ("x", "auto", True)
    assert arguments.integers("sizes") == (1, 2)
    assert arguments.given("chat")
    assert not arguments.given("sizes")


def test_two_runs_do_not_share_values(flags):
    assert flags.parse(["--model=x", "--exit_layer=3"]).exit_layer == 3
    other = CommandFlags()
    other.group("First")
    other.integer_or_auto("exit_layer", None, "A layer.")
    assert other.parse([]).exit_layer is None


def test_a_path_may_begin_at_home(flags, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert flags.parse(["--model=~/runs/x"]).model == "/home/somebody/runs/x"
    assert flags.parse(["--model", "~/runs/x"]).model == "/home/somebody/runs/x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model=... (see --help)"),
        (["--model="], "flag --model=: an empty text is no path (see --help)"),
        (["--modle=x"], "unknown flag --modle; did you mean --model?"),
        (["--model=x", "--frobnicate"], "unknown flag --frobnicate (see --help)"),
        (["--model=x", "y"], "unexpected argument 'y'; every option is --name=value (see --help)"),
        (["--model=x", "--exit_layer=two"], "'two' is neither a number nor auto"),
        (["--model=x", "--pdb"], "unknown flag --pdb (see --help)"),
    ],
)
def test_a_wrong_flag_is_named(flags, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        flags.parse(arguments)


def test_a_list_that_is_not_of_numbers_is_named(flags):
    with pytest.raises(UserError, match=re.escape("--sizes must be numbers separated by commas, got '1,x'")):
        flags.parse(["--model=x", "--sizes=1,x"]).integers("sizes")


def test_a_flag_without_effect_is_refused_only_when_it_was_given(flags):
    flags.parse(["--model=x"]).refuse(["chat"], "nobody listens")
    with pytest.raises(UserError, match="--chat has no effect here: nobody listens"):
        flags.parse(["--model=x", "--chat"]).refuse(["chat"], "nobody listens")


def test_help_lists_the_flags_in_their_groups_within_80_columns(flags):
    text = flags.help_text()
    first, second, last = text.split("\n\n")
    assert first.splitlines()[0] == "First"
    assert "  --model=PATH              Where the model is. (required)" in first
    assert "(default: 1,2)" in first
    assert "--exit_layer=N|auto" in second
    assert "--chat " in second
    assert last == 'The last value of a flag counts, so a script may set defaults before "$@".'
    assert max(map(len, text.splitlines())) <= 80


def test_the_last_value_of_a_flag_counts(flags):
    given = ["--model=x", "--exit_layer=2", "--sizes=1,2", "--chat", "--exit_layer", "3", "--sizes=4", "--nochat"]
    arguments = flags.parse(given)
    assert (arguments.exit_layer, arguments.chat, arguments.integers("sizes")) == (3, False, (4,))


def parse_config(*arguments):
    flags = CommandFlags()
    flags.group("What to train")
    flags.config()
    return flags.parse(arguments).read_config()


def test_a_configuration_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    path = configs_folder() / "pretrain_7b.py"
    assert path.is_file()
    by_name = parse_config("--config=pretrain_7b", "--config.training.seed=7")
    assert by_name == parse_config("--config", str(path), "--config.training.seed", "7")
    assert by_name.training.seed == 7
    assert by_name.model.width == 4096
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(path.read_text())
    assert parse_config("--config=~/mine.py") == parse_config("--config=pretrain_7b")


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text((configs_folder() / "pretrain_7b.py").read_text())
    assert find_config("demo") == "demo"
    assert find_config("demo:x") == "demo:x"
    assert find_config("ablate:x") == f"{configs_folder() / 'ablate.py'}:x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pretrane_7b", "there is no file 'pretrane_7b'; near names of configurations that ship: pretrain_7b,"),
        ("configs/pretrain_7.py", "near names of configurations that ship: pretrain_7b,"),
        ("xyz", f"and no configuration of that name; those that ship: {', '.join(config_names())}"),
        ("", "the value is empty"),
        ("/tmp", "'/tmp' is a folder"),
    ],
)
def test_an_unknown_configuration_is_one_line_with_near_names(name, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_config(f"--config={name}")
    assert "\n" not in str(error.value)


def test_a_default_configuration_may_be_changed_by_key():
    flags = CommandFlags()
    flags.group("What to train")
    flags.config(default="demo")
    assert flags.parse(["--config.training.seed=9"]).read_config().training.seed == 9


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
@pytest.mark.parametrize(("first", "last"), [("ablate", "scratch"), ("scratch", "ablate"), ("nowhere", "ablate")])
def test_the_last_configuration_counts_and_keys_stay_wherever_they_stand(form, first, last):
    wanted = parse_config(f"--config={last}", "--config.training.seed=5", "--config.data.text_key=words")
    keys = ("--config.training.seed=3", "--config.training.seed=5", "--config.data.text_key=words")
    files = (form.format(first).split(), form.format(last).split())
    assert parse_config(keys[0], *files[0], *keys[1:], *files[1]) == wanted
    assert parse_config(*files[0], *keys, *files[1]) == wanted
    assert parse_config(*files[0], *files[1], *keys) == wanted
    assert wanted.model.num_layers == {"scratch": 12, "ablate": 8}[last]
