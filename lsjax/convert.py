"""A model from one kind of folder into another."""

import shutil
import tempfile
from pathlib import Path

from lsjax.checkpoint import save_model
from lsjax.errors import UserError
from lsjax.files import make_folder
from lsjax.interop.huggingface import write_huggingface
from lsjax.loading import Model, load
from lsjax.training.workdir import write_model_config

FORMATS = ("huggingface", "lsjax")


def convert(source: str | Path, target: str | Path, form: str, dtype: str = "stored") -> Model:
    """Writes the model at `source` (anything `load` takes) to the new folder `target`; returns it.

    form: "huggingface" (transformers loads it) or "lsjax" (`load` and config.initial_model take it). dtype: that of
    the weights; "stored" keeps them bit for bit. The folder appears whole or not at all. Raises UserError when it
    exists and holds something, or the source cannot be read.
    """
    target = Path(target)
    if form not in FORMATS:
        raise UserError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and holds something; give a new folder")
    make_folder(target.absolute().parent, "folder")
    model = load(source, dtype=dtype)
    scratch = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}."))
    try:
        _write(model, scratch, form)
        scratch.chmod(0o755)
        scratch.replace(target)
    except UserError:
        raise
    except Exception as error:  # safetensors and Orbax have their own for a full disk
        raise UserError(f"cannot write {target}: {str(error).strip() or type(error).__name__}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return model


def _write(model: Model, folder: Path, form: str) -> None:
    if form == "huggingface":
        write_huggingface(folder, model.config, model.params, model.tokenizer)
    else:
        save_model(folder, model.params)
        model.tokenizer.save(folder)
        write_model_config(folder, model.config)
