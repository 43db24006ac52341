"""The pages are true: links lead somewhere, named files exist, configurations are valid, every key is described."""

import importlib.util
import re
from pathlib import Path

import pytest

import lsjax
from lsjax.config import Config
from tests.helpers.pages import PAGE, PAGES, ROOT, keys_of, text_of

NAMED = r"(?:lsjax|launch|configs|tests|docs|examples|pallas_kernels)"


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}
    assert len([page for page in PAGES if page.parent.name == "docs"]) >= 8


@PAGE
def test_relative_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@PAGE
def test_named_files_and_folders_exist(page):
    for path in re.findall(rf"(?<![\w/.-]){NAMED}/[\w./-]*\w", text_of(page)):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"


@PAGE
def test_named_make_targets_exist(page):
    makefile = text_of(ROOT / "Makefile")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text_of(page), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, f"{page.name} names make {target}"


def test_the_public_workflow_runs_what_ci_runs():
    workflow = text_of(ROOT / ".github" / "workflows" / "ci.yml")
    targets = re.search(r"target: \[(.*)\]", workflow).group(1).split(", ")
    assert set(re.findall(r"^make (\S+)", text_of(ROOT / ".ci" / "run"), flags=re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", ["training.md", "models.md"])
def test_example_configurations_are_valid(page, tmp_path, monkeypatch):
    import json

    folder = tmp_path / "models" / "Llama-3.2-1B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / page), flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert Config.from_dict(names["get_config"]().to_dict()) != Config()


LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def load_hook(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipes_page_shows_every_key_once():
    hook = load_hook("config_keys")
    page = hook.on_page_markdown(text_of(ROOT / "docs" / "recipes.md"))
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`[^`]+`|empty) \| (.*) \|$", page, flags=re.MULTILINE)
    shown = [key for key, _ in rows]
    assert len(shown) == len(set(shown))
    assert set(shown) == keys_of(Config().to_dict())
    assert not [key for key, meaning in rows if not meaning], "document these under their fields in lsjax/config.py"


def test_the_api_page_shows_every_public_name():
    shown = re.findall(r"^::: lsjax\.(\w+)$", text_of(ROOT / "docs" / "api.md"), flags=re.MULTILINE)
    assert sorted(shown) == sorted({*lsjax.__all__} - {"__version__"})


def test_the_key_table_shows_default_choices_and_meaning():
    hook = load_hook("config_keys")
    source = '''
Kind = Literal["a", "b"]

class Inner:
    x: int = 3
    """Counts
    | things."""

class Part:
    kind: Kind = "a"
    """Says which."""
    inner: Inner = Inner()

class Config:
    part: Part = Part()
    name: str = ""
'''
    sections = hook.config_sections(source)
    assert hook.table(sections["part"]).splitlines()[2:] == [
        "| `part.kind` | `a` | One of `a`, `b`. Says which. |",
        "| `part.inner.x` | `3` | Counts \\| things. |",
    ]
    assert [key.name for key in sections["top"]] == ["name"]


def test_the_documentation_is_built_strictly():
    """MkDocs does not count warnings with --quiet, so --strict would let a broken link pass."""
    (command,) = re.findall(r"mkdocs build (.*)", text_of(ROOT / "Makefile"))
    assert "--strict" in command
    assert "--quiet" not in command
