"""The house stays in order: imports acyclic, files short, the kernels independent of the library."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("lsjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES}


def test_the_import_graph_has_no_cycle():
    graph = {name: imports(path) - {name} for name, path in MODULES.items()}
    assert len(graph) > 20
    done: set[str] = set()
    while len(done) < len(graph):
        free = [name for name in graph if name not in done and graph[name] <= done]
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done.update(free)


def test_kernels_do_not_import_the_library():
    for name, path in MODULES.items():
        if name.startswith("pallas_kernels"):
            assert not any(other.startswith("lsjax") for other in imports(path)), name


def test_files_stay_under_400_lines():
    long = {str(path): count for path in FILES if (count := path.read_text().count("\n")) >= 400}
    assert not long
