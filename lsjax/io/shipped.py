"""Models by name: those of models/, which a wheel carries inside the package."""

from pathlib import Path

from lsjax.files import shipped_folder


def shipped_model(name: str | Path) -> Path | None:
    """Returns the folder of a model that ships under this name, or None. A path that exists takes precedence."""
    ships = str(name) in shipped_models() and not Path(name).exists()
    return shipped_folder("models") / name if ships else None


def shipped_models() -> list[str]:
    """Returns the names of the models that ship."""
    return sorted(path.parent.name for path in shipped_folder("models").glob("*/config.json"))
