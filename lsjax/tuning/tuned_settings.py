"""Tuned settings beside a model, tuned_settings.json: the fastest setting at some temperatures and batch sizes.

`tune_table` writes the file. "auto" takes the nearest of its settings, and then measures nothing. The file also says
what the figures depend on, so that another model, device or version never decodes by it.
"""

import functools
import hashlib
import json
import logging
import math
import numbers
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.data.pool import core_count
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.forward import cache_dtype
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import AUTO, INT8, Autoregressive, SelfSpeculative, Strategy, check_strategy, label
from lsjax.errors import UserError, shown
from lsjax.files import read_json, write_atomically
from lsjax.io.beside import is_beside, path_beside
from lsjax.io.draft_vocabulary import has_list, ids_digest, list_path, read_list
from lsjax.model.execution import CPU_INFO
from lsjax.tuning.choices import Drafter, DraftWeights

FILE = "tuned_settings.json"
BOTH_AUTO = SelfSpeculative(AUTO, AUTO)
_FORMAT = 2  # 1 did not know drafts in int8


class TunedSetting(NamedTuple):
    """The fastest setting at a temperature and a batch size.

    exit_layer, num_speculations, draft_vocabulary, draft_weights: as in SelfSpeculative; None, and 0 drafts, where
      autoregressive decoding is predicted to be the fastest.
    predicted_speedup: that of the best setting of self-speculation over autoregressive decoding, below 1 or not.
    """

    temperature: float
    batch_size: int
    exit_layer: int | None
    num_speculations: int
    draft_vocabulary: int | None
    predicted_speedup: float
    draft_weights: DraftWeights = None

    @property
    def strategy(self) -> Strategy:
        """The setting, ready to use."""
        if self.exit_layer is None:
            return Autoregressive()
        return Drafter(self.draft_weights, self.draft_vocabulary).strategy(self.exit_layer, self.num_speculations)

    def __str__(self) -> str:
        place = f"temperature {self.temperature:g}, batch size {self.batch_size}: {label(self.strategy)}"
        if self.num_speculations:
            return f"{place}, predicted at {self.predicted_speedup:.2f} times autoregressive"
        return f"{place} (d=0); the best drafts are predicted at {self.predicted_speedup:.2f} times its speed"


class TunedSettings(NamedTuple):
    """A table of tuned settings.

    settings: one for each temperature and batch size that was measured.
    tuned_for: what the table depends on (`describe_use`).
    """

    settings: tuple[TunedSetting, ...]
    tuned_for: dict[str, Any]

    def nearest(self, temperature: float, batch_size: int) -> TunedSetting:
        """Returns the setting of the nearest temperature, and among those of the nearest batch size by ratio.

        Halfway it takes the higher temperature and the larger batch, where drafts gain less.
        """

        def distance(setting: TunedSetting) -> tuple[float, ...]:
            by_ratio = abs(math.log(setting.batch_size / batch_size))
            return abs(setting.temperature - temperature), -setting.temperature, by_ratio, -setting.batch_size

        return min(self.settings, key=distance)

    def __str__(self) -> str:
        return "\n".join(map(str, self.settings))


def settings_path(model_path: str) -> Path:
    """Returns where the tuned settings of the model at a path lie (`path_beside`).

    model_path: empty for a model that has none. Raises UserError when there is no such place.
    """
    if not model_path:
        raise UserError("this model was not loaded from files, so there is no folder for its tuned settings")
    return path_beside(model_path, FILE)


def write_settings(path: Path, table: TunedSettings) -> None:
    """Writes a table, whole or not at all."""
    settings = [setting._asdict() for setting in table.settings]
    write_atomically(
        path, json.dumps({"format": _FORMAT, "tuned_for": table.tuned_for, "settings": settings}, indent=1)
    )


def read_settings(path: Path, num_layers: int) -> TunedSettings:
    """Reads a table. Raises UserError when it cannot be read, or holds what `write_settings` does not write."""
    content = read_json(path)
    settings, tuned_for = content.get("settings"), content.get("tuned_for")
    if content.get("format") == _FORMAT - 1:
        raise UserError(f"{path} is of an earlier version, which measured no drafts in int8: renew it with lsjax tune")
    if content.get("format") != _FORMAT or not isinstance(tuned_for, dict) or not isinstance(settings, list):
        raise UserError(f"{path} is no table of tuned settings")
    if not settings:
        raise UserError(f"{path} is damaged: it holds no settings")
    return TunedSettings(tuple(_checked(row, num_layers, path) for row in settings), tuned_for)


def _checked(row: Any, num_layers: int, path: Path) -> TunedSetting:
    """Returns the setting that a row of a table holds. Raises UserError when it holds anything else."""
    damaged = UserError(f"{path} is damaged: it holds {shown(row)}")
    if not isinstance(row, dict) or {*row} != {*TunedSetting._fields}:
        raise damaged
    setting = TunedSetting(**row)
    whole = [setting.batch_size, setting.num_speculations, setting.exit_layer or 0, setting.draft_vocabulary or 1]
    real = [setting.temperature, setting.predicted_speedup]
    if not all(_is(value, numbers.Integral) for value in whole) or not all(_is(value, numbers.Real) for value in real):
        raise damaged
    in_range = setting.batch_size >= 1 and 0 <= setting.temperature < math.inf and min(whole) >= 0
    if not in_range or (setting.exit_layer is None) != (setting.num_speculations == 0):
        raise damaged
    if setting.exit_layer is None and setting.draft_weights is not None:
        raise damaged
    try:
        check_strategy(setting.strategy, num_layers)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return setting


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def saved_strategy(strategy: SelfSpeculative, model: Model, batch: PromptBatch) -> Strategy | None:
    """Returns what the table beside a model says for a batch; None when there is none that may be used.

    Logs one line that says which setting it is, or why the table is not used.
    """
    if not model.path:
        return None
    try:
        if not is_beside(model.path, FILE):
            return None
        path = settings_path(model.path)
        if strategy != BOTH_AUTO:
            raise UserError(f'{path} is for "auto" of both exit_layer and num_speculations alone')
        table = read_settings(path, model.config.num_layers)
        _check_use(table, model, path)
        chosen = table.nearest(_temperature(batch), batch.batch_size)
    except (UserError, OSError) as error:
        reason = error if isinstance(error, UserError) else f"cannot read {FILE} of {model.path}: {error.strerror}"
        _say_once(f'"auto" measures, at every call: {reason}')
        return None
    _say_once(f'"auto" takes a setting of {path}: {chosen}')
    return chosen.strategy


def _temperature(batch: PromptBatch) -> float:
    """Returns the temperature of a batch; with one per prompt, their median."""
    return float(np.median(getattr(batch.sampler, "temperature", 0.0)))


def _check_use(table: TunedSettings, model: Model, path: Path) -> None:
    """Raises UserError when a table was tuned for something else than this model as it is used here."""
    here = describe_use(model)
    for key in {**here, **table.tuned_for}:
        then, now = table.tuned_for.get(key), here.get(key)
        if then != now:
            raise UserError(
                f"{path} was tuned with {key} {shown(then)}, and here it is {shown(now)}; renew it with: "
                f"lsjax tune --model={model.path}"
            )


def describe_use(model: Model) -> dict[str, Any]:
    """Returns what the best setting depends on, beside the prompts: the weights, their form, the device and versions.

    weights: a SHA-256 of the first row of every array that decoding reads. Training changes every row.
    """
    weights = model.decoder_weights()
    vocab_size = model.config.vocab_size
    return {
        "weights": _sha256_of_rows((weights, model.exit_adapter)),
        "dtype": INT8 if model.in_int8 else str(weights["embed"].dtype),
        "cache": str(cache_dtype(weights, model.cache)),
        "kernels": model.kernels,
        "draft_vocabulary": ids_digest(read_list(list_path(model.path), vocab_size)) if has_list(model.path) else None,
        "device": _device_name(),
        "devices": len(weights["embed"].sharding.device_set),
        "jax": jax.__version__,
    }


def _sha256_of_rows(tree: Any) -> str:
    """Returns a SHA-256 of the names, shapes and first rows of all arrays of a tree. A row lies along the last axis."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        row = np.asarray(leaf[(0,) * (leaf.ndim - 1)] if leaf.ndim else leaf)  # never a whole matrix
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {row.dtype}".encode())
        digest.update(np.ascontiguousarray(row).tobytes())
    return digest.hexdigest()


@functools.cache
def _device_name() -> str:
    """Returns the kind of the device; of a CPU also its model and the number of cores, which JAX does not tell."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        model = re.search(r"^model name\s*: (.*)$", CPU_INFO.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        model = None
    return f"{model[1] if model else device.device_kind}, {core_count()} core(s)"


@functools.cache
def _say_once(message: str) -> None:
    logging.warning(message)
