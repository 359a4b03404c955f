"""How large and how tangled the source is: the figures that docs/log.md holds before and after a redesign.

`python scripts/measures.py [FOLDER]`; FOLDER is src where it is left out.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

PACKAGE = "underpaint"
LAZY = {"__init__", "cli"}  # whose imports inside functions keep the start quick
LONG = 60  # lines of a function
TEXT = {".py", ".html", ".css", ".js", ".jinja2"}


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def docstring_lines(tree: ast.AST) -> int:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)
    ]
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in found)


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in given)


def room_of(module: str) -> str:
    """The folder, or the file, below the package that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(tree: ast.AST, inside_functions: bool) -> list[str]:
    """Modules of the package that a file imports, at its top or inside functions."""
    inner = {id(node) for function in functions(tree) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if (id(node) in inner) != inside_functions:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            whole = node.module == PACKAGE
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [name for name in names if name.split(".")[0] == PACKAGE]
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of rooms each of which can be reached from every other one (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(room: str) -> None:
        number[room] = low[room] = len(number)
        stack.append(room)
        for other in sorted(arrows.get(room, ())):
            if other not in number:
                visit(other)
                low[room] = min(low[room], low[other])
            elif other in stack:
                low[room] = min(low[room], number[other])
        if low[room] == number[room]:
            group = stack[stack.index(room) :]
            del stack[stack.index(room) :]
            if len(group) > 1:
                found.append(sorted(group))

    for room in sorted(arrows):
        if room not in number:
            visit(room)
    return found


def words(text: str) -> tuple[int, int]:
    """`Any`, casts and ignores in code and comments; and `dict[str, Any]`."""
    names = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    loose = sum(name in ("Any", "cast") for name in names)
    ignores = sum(bool(re.search(r"type: ignore|pyright: ignore|noqa", name)) for name in names if name.startswith("#"))
    return loose + ignores, len(re.findall(r"dict\[str, Any\]", text))


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "src")
    files = sorted(root.rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    every = [(file, function) for file, tree in trees.items() for function in functions(tree)]
    sizes = sorted(
        (((f.end_lineno or 0) - f.lineno + 1, f"{file.relative_to(root)}:{f.name}") for file, f in every), reverse=True
    )
    taken = max(((arguments(f), f"{file.relative_to(root)}:{f.name}") for file, f in every))
    arrows: dict[str, set[str]] = defaultdict(set)
    inside = []
    for file, tree in trees.items():
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name in imported(tree, False):
            if room_of(name) != room_of(module) and room_of(module) not in LAZY:
                arrows[room_of(module)].add(room_of(name))
        if file.stem not in LAZY:
            inside += [f"{file.relative_to(root)}: {name}" for name in imported(tree, True)]
    counted = [words(file.read_text()) for file in files]
    lines = sum(len(file.read_text().splitlines()) for file in root.rglob("*") if file.suffix in TEXT)
    docs = sum(docstring_lines(tree) for tree in trees.values())
    print(f"statements: {sum(isinstance(n, ast.stmt) for tree in trees.values() for n in ast.walk(tree)):,}")
    print(f"docstring lines: {docs:,} ({docs / lines:.1%} of all lines)")
    print(f"lines, with templates, styles and scripts: {lines:,}")
    print(f"longest function: {sizes[0][0]} lines ({sizes[0][1]}); over {LONG}: {sum(n > LONG for n, _ in sizes)}")
    print(f"most arguments: {taken[0]} ({taken[1]})")
    print(f"Any, casts, ignores: {sum(n for n, _ in counted)}; dict[str, Any]: {sum(n for _, n in counted)}")
    rings = circles(arrows)
    print(f"circles of rooms: {len(rings)}" + "".join(f" ({', '.join(ring)})" for ring in rings))
    print(f"imports inside functions: {len(inside)}" + (f" ({'; '.join(inside)})" if inside else ""))


if __name__ == "__main__":
    main()
