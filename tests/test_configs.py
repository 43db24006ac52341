"""Every configuration is valid, and the paper's runs have the paper's values: arXiv 2404.16710, Tables 8 to 10."""

import ast
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import lsjax.config as config_module
from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.model.transformer import count_params

FOLDER = Path(__file__).parent.parent / "configs"

# Layers, width, tokens seen, learning rate, p_max, S(t), e_scale, curriculum (its R). None: not in the paper.
PAPER = {
    "pretrain_1_5b": (24, 2048, 26e9, 8e-4, 0.1, "exponential", 0.2, 23),
    "pretrain_7b": (32, 4096, 26e9, 8e-4, 0.2, "exponential", 0.2, 31),
    "continual_llama2_7b": (32, 4096, 52e9, 3e-5, 0.1, "constant", 0.2, 8),
    "continual_llama2_13b": (40, 5120, 52e9, 2e-5, 0.1, "constant", 0.1, 39),
    "continual_llama3_8b": (32, 4096, 419e9, None, 0.1, "constant", 0.1, 8),
    "continual_llama3_2_1b": (16, 2048, 839e9, None, 0.1, "constant", 0.1, 8),
    "finetune_code_7b": (32, 4096, 5.2e9, 1e-4, 0.1, "constant", 1.0, 16),
    "finetune_topv2_1_5b": (24, 2048, 5800 * 256 * 4096, 1e-4, 0.2, "constant", 1.0, "gradual"),
}
# Published parameter counts.
PARAMETERS = {
    "pretrain_7b": 6_738_415_616,
    "continual_llama2_13b": 13_015_864_320,
    "continual_llama3_8b": 8_030_261_248,
    "continual_llama3_2_1b": 1_235_814_400,
    "finetune_code_7b": 6_738_415_616,
    "pretrain_70b": 68_976_648_192,
}


def read(name: str) -> Config:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Config.from_dict(module.get_config().to_dict())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_valid_and_says_how_to_run_it(path):
    read(path.stem)
    text = path.read_text()
    assert f"--config=configs/{path.name}" in text
    assert "\nHardware: " in text
    assert "\nExpected: " in text


def test_the_runs_with_and_without_layerskip_differ_in_nothing_else():
    with_layerskip, without = (read(name) for name in ("layerskip_python_20m", "python_20m"))
    assert with_layerskip.layerskip != without.layerskip
    assert dataclasses.replace(with_layerskip, layerskip=without.layerskip) == without


def test_every_key_is_documented_under_its_field():
    classes = [node for node in ast.parse(inspect.getsource(config_module)).body if isinstance(node, ast.ClassDef)]
    assert len(classes) == 9
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{field.target.id} has no text under it"


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "seed", 2**32, "config.training.seed must be at most 4294967295"),
        ("training", "seed", -1, "config.training.seed must not be negative"),
        ("training", "seed", True, "config.training.seed must be int, got True"),
        ("training", "attention", "fast", "config.training.attention is 'fast'; choose one of auto, flash, plain"),
        ("training", "attention", ["auto"], "config.training.attention is ['auto']; choose one of"),
        ("training", "learning_rate", float("nan"), "config.training.learning_rate must be a finite number, got nan"),
        ("training", "learning_rate", 1e39, "config.training.learning_rate must be at most 3.4e+38, got 1e+39"),
        ("training", "learning_rate", 10**400, "config.training.learning_rate must be a float"),
        ("training", "total_steps", 2**31, "config.training.total_steps must be at most 2147483647"),
        ("model", "rope_theta", float("inf"), "config.model.rope_theta must be a finite number, got inf"),
        ("model", "rope_scaling", {"kind": "yarn"}, "config.model.rope_scaling.kind is 'yarn'; choose one of none"),
        ("model", "rope_scaling", 3, "config.model.rope_scaling must be a section of keys, got 3"),
        ("data", 7, "x", "unknown config key config.data.7"),
    ],
)
def test_a_bad_value_is_named(section, key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Config.from_dict({section: {key: value}})


def test_the_largest_seed_is_taken():
    assert Config.from_dict({"training": {"seed": 2**32 - 1}}).training.seed == 2**32 - 1


@pytest.mark.parametrize("name", PAPER)
def test_a_run_of_the_paper_has_its_values(name):
    config = read(name)
    layers, width, tokens, rate, p_max, in_time, e_scale, curriculum = PAPER[name]
    c, s, t = config.model, config.layerskip, config.training
    assert (c.num_layers, c.width) == (layers, width)
    assert t.total_steps * t.batch_size * t.sequence_length == pytest.approx(tokens, rel=0.02)
    assert rate is None or t.learning_rate == rate
    assert (s.dropout_max_rate, s.dropout_depth_schedule, s.dropout_time_schedule) == (p_max, "exponential", in_time)
    assert s.exit_scale == e_scale
    assert curriculum in (s.exit_rotation, s.exit_curriculum)
    assert s.exit_curriculum == ("gradual" if curriculum == "gradual" else "rotational")
    extras = (
        s.exit_weight_floor,
        s.exit_distillation,
        s.exit_distillation_schedule,
        s.draft_exit,
        s.exit_first,
        s.exit_last,
        s.exit_token_stride,
        s.exits_train_head,
    )
    assert extras == (0, 0, "constant", 0, 1, 0, 1, True)
    assert s.dropout_granularity == "sample"
    assert not s.dropout_rescale


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_model_has_its_published_size(name):
    assert count_params(read(name).model) == PARAMETERS[name]
