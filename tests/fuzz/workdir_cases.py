"""Damaged workdirs: loaded, and resumed."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lsjax
from tests.fuzz import mutations
from tests.fuzz.harness import Case
from tests.fuzz.model_cases import damaged_copy, is_the_trained_model, load_case
from tests.fuzz.mutations import Damage, flip_bits, set_key
from tests.fuzz.parts import check_model, same_params


def workdir_cases() -> Iterator[Case]:
    """Damaged workdirs, loaded for decoding and resumed."""
    rng = random.Random(13)
    keys = [("model",), ("training",), ("model", "num_layers"), ("model", "width"), ("model", "vocab_size"),
            ("model", "rope_theta"), ("model", "rms_norm_epsilon"), ("model", "context_length"),
            ("model", "rope_scaling"), ("model", "tie_embeddings"), ("model", "head_width")]  # fmt: skip
    chosen: set[tuple] = set()
    while len(chosen) < 20:
        chosen.add((rng.choice(keys), rng.choice([*mutations.VALUES])))
    for path, name in sorted(chosen):
        damage = set_key(path, mutations.VALUES[name])
        yield load_case(f"workdir config.json {'.'.join(path)}: {name}", "workdir", "config.json", damage,
                        is_the_trained_weights)  # fmt: skip
    for file in ("config.json", "tokenizer.json"):
        for name in ("deleted", "emptied", "halved", "garbage", "a folder", "nested 100,000 deep", "a list"):
            yield load_case(
                f"workdir {file}: {name}", "workdir", file, mutations.WHOLE_FILE[name], is_the_trained_model
            )
    for seed in range(30):
        yield load_case(f"workdir: checkpoint flip {seed}", "workdir", "checkpoints", checkpoint_damage(seed, "flip"),
                        is_the_trained_model)  # fmt: skip
    for seed in range(15):
        for kind in ("emptied", "halved"):
            yield load_case(f"workdir: checkpoint file {seed} {kind}", "workdir", "checkpoints",
                            checkpoint_damage(seed, kind), is_the_trained_model)  # fmt: skip
    yield from resume_cases()


def is_the_trained_weights(parts: Any, result: tuple[Path, lsjax.Model]) -> None:
    """Checks a workdir with another value in its config: the weights are those of the checkpoint."""
    assert same_params(result[1].params, parts.trained.params), "its parameters are not those that were saved"
    check_model(result[1])


def checkpoint_damage(seed: int, kind: str) -> Damage:
    """Returns a damage of one of the files of the last checkpoint, chosen by the seed."""

    def damage(folder: Path) -> None:
        files = sorted(path for path in (folder / "4").rglob("*") if path.is_file() and path.stat().st_size)
        path = files[seed % len(files)]
        (flip_bits(seed) if kind == "flip" else mutations.WHOLE_FILE[kind])(path)

    return damage


_RESUMED_OUTPUTS = ("run",)
# What a run that resumes brings back to its checkpoint, or writes anew, before it reads the first batch.
_BROUGHT_BACK = tuple(
    f"run/{name}" for name in ("metrics", "evaluations", "tensorboard", "config", "tokenizer", "generation_config")
)


_TRAIN = "train-000000-0000.arrayrecord"  # a small corpus is one unit of one part


def resume_cases() -> Iterator[Case]:
    """Runs that resume in a damaged workdir: refused in one line, or ending as the run that nothing was done to."""
    files = ["config.json", "tokenizer.json", "metrics.jsonl", "evaluations.jsonl", "data/manifest.json"]
    files += [f"data/{name}" for name in ("tokenizer.json", _TRAIN, "held_out-000000-0000.arrayrecord")]
    for file in files:
        for name in ("deleted", "emptied", "halved", "garbage", "a folder"):
            yield resume_case(f"resume {file}: {name}", file, mutations.WHOLE_FILE[name])
    for seed in range(8):
        yield resume_case(f"resume data/{_TRAIN}: flip {seed}", f"data/{_TRAIN}", flip_bits(seed, 3))
    yield resume_case("resume tensorboard: a file", "tensorboard", _file_instead)
    yield resume_case("resume checkpoints: a file", "checkpoints", _file_instead)
    yield resume_case("resume data: a file", "data", _file_instead)


def resume_case(name: str, file: str, damage: Damage) -> Case:
    """Returns a case that resumes a half-done run after a damage."""

    def call(parts, watch):
        workdir = damaged_copy(parts.half_done, watch, "run", file, damage)
        return lsjax.train(parts.config, workdir, verbose=False)

    def check(parts, result):
        assert result.step == 4
        assert same_params(result.params, parts.trained.params), "it ends with other parameters than an undisturbed run"

    return Case(name, call, check, outputs=_RESUMED_OUTPUTS, touched=_BROUGHT_BACK)


def _file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")
