"""The measures of docs/architecture.md's style that ruff doesn't take: widths, lengths, circles."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("sdar", "services", "loadtest", "tools")
GENERATED = ROOT / "sdar" / "v1"

MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 60
MAX_P90_FUNCTION_LINES = 20
MAX_CLASS_LINES = 300

REASON = "One class because"
"""Begins the sentence by which a long class says in its first paragraph why it stays whole."""


def list_files(*folders: str) -> list[Path]:
    files = chain.from_iterable(sorted((ROOT / folder).rglob("*.py")) for folder in folders)
    return [file for file in files if GENERATED not in file.parents]


def parse(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for file in list_files(*folders):
        yield file, ast.parse(file.read_text())


def count_lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines from `def` or `class` to the end, with the docstring and without decorators."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def measure_functions() -> dict[str, int]:
    """Lines of every function and method by its place."""
    found: dict[str, int] = {}
    for file, tree in parse(*CODE):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] = count_lines(node)
    return found


def has_reason(node: ast.ClassDef) -> bool:
    paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
    sentences = " ".join(paragraph.split()).split(". ")
    return any(sentence.startswith(REASON) for sentence in sentences)


# ---- imports


def name_module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def list_imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Modules that this one imports as it is loaded: not those inside functions or for types."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def build_graph() -> dict[str, set[str]]:
    """Module of sdar and services: those of them that it imports."""
    trees = {name_module(file): tree for file, tree in parse("sdar", "services")}
    modules = set(trees)
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        graph[name] = modules.intersection(list_imports(tree, modules)) - {name}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


# ---- the measures


def test_no_line_is_over_100_columns():
    long = []
    for file in list_files(*CODE, "tests", "examples"):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if len(line) > MAX_COLUMNS:
                long.append(f"{file.relative_to(ROOT)}:{number}: {len(line)}")
    assert not long


def test_no_function_is_over_60_lines():
    lines = measure_functions()
    assert {place: count for place, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_nine_of_ten_functions_have_at_most_20_lines():
    lines = sorted(measure_functions().values())
    assert lines[len(lines) * 9 // 10] <= MAX_P90_FUNCTION_LINES


def test_no_class_is_over_300_lines_unless_it_says_why():
    long = []
    for file, tree in parse(*CODE):
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef) or count_lines(node) <= MAX_CLASS_LINES:
                continue
            if not has_reason(node):
                long.append(f"{file.relative_to(ROOT)} {node.name}: {count_lines(node)}")
    assert not long, f'part them, or say "{REASON} ..." in the docstring\'s first paragraph'


def test_every_module_has_a_docstring():
    trees = dict(parse(*CODE))
    assert [str(file) for file, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_no_module_imports_itself_by_way_of_others():
    assert find_circle(build_graph()) == []


# ---- and that they measure


def test_imports_are_followed_to_submodules_but_not_into_functions_or_types():
    source = """
from sdar import bus
from sdar.config import RunConfig
if TYPE_CHECKING:
    from sdar.weights import store
try:
    import sdar.wire
except ImportError:
    pass
class Late:
    def load(self):
        import sdar.model
"""
    found = list_imports(ast.parse(source), {"sdar", "sdar.bus", "sdar.config"})
    assert set(found) == {"sdar.bus", "sdar.config", "sdar.wire"}


def test_a_circle_of_three_is_found_and_named():
    circle = find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert circle[0] == circle[-1]
    assert set(circle) == {"a", "b", "c"}


def test_a_reason_counts_only_in_the_first_paragraph():
    source = '''
class First:
    """Does it. One class because its state is one."""
class Second:
    """Does it.

    One class because its state is one.
    """
'''
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert [has_reason(node) for node in classes] == [True, False]
