"""The house stays in order: packages import only from lower floors, files and functions short, kernels on their own."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("lsjax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])

# From the ground up. A package imports from itself and from the floors below it, never from its own floor's others.
FLOORS = (
    {"lsjax.errors", "lsjax.notebook"},
    {"lsjax.buckets"},
    {"lsjax.files", "lsjax.checks"},
    {"lsjax.scratch", "lsjax.config_checks"},
    {"lsjax.config"},
    {"pallas_kernels", "lsjax.parallel", "lsjax.data"},
    {"lsjax.model"},
    {"lsjax.layerskip", "lsjax.io"},
    {"lsjax.evaluation", "lsjax.decoding"},
    {"lsjax.costs"},
    {"lsjax.training", "lsjax.tuning", "lsjax.reports"},
    {"lsjax.generation", "lsjax.benchmarks", "lsjax.aot"},
    {"lsjax.experiments", "lsjax.explain"},
    {"lsjax.cli", "lsjax"},
    {"lsjax.__main__"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "lsjax" or len(parts) == 1 else ".".join(parts[:2])


def imports(path: Path) -> set[str]:
    """Returns the modules of this repository that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES}


def test_packages_import_only_from_lower_floors():
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if room_of(other) != room_of(module) and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(module)]
    ]
    assert not upward, "\n".join(upward)


def test_the_import_graph_has_no_cycle():
    graph = {name: imports(path) - {name} for name, path in MODULES.items()}
    assert len(graph) > 20
    done: set[str] = set()
    while len(done) < len(graph):
        free = [name for name in graph if name not in done and graph[name] <= done]
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done.update(free)


def test_files_stay_under_400_lines():
    long = {str(path): count for path in FILES if (count := path.read_text().count("\n")) >= 400}
    assert not long


def test_functions_stay_under_50_lines():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]
    assert not long, "\n".join(long)


WITHOUT_SUBJECT = {"Of", "What", "As", "By", "Where", "From", "To", "For"}


def test_docstrings_begin_with_a_subject_or_a_verb():
    """A docstring whose first word is a preposition or a question word makes its reader guess."""
    folders = ("lsjax", "pallas_kernels", "launch", "configs", "tests", "examples")
    vague = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"
        for folder in folders
        for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (text := ast.get_docstring(node))
        and text.split()[0].strip(",:") in WITHOUT_SUBJECT
    ]
    assert not vague, "\n".join(vague)
