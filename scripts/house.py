"""Measures a checkout as one who reads it meets it: `python scripts/house.py [FOLDER] [--json]`.

Lines and files by folder, the longest files and functions, what the training loop reaches by imports, circles of
modules, and blocks of code that stand in more than one place.
"""

import argparse
import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDERS = {"babl": "babl", "scripts": "babl.scripts", "kernels": "babl.kernels"}  # and the packages they are
BLOCK = 8  # lines that are equal, in a row, are a block
SHOWN = 8  # of the longest


def measure(root: Path) -> dict[str, Any]:
    """Returns the figures of a checkout."""
    sizes = {name: _sizes(root / name) for name in (*FOLDERS, "tests")}
    paths = dict(_modules(root))
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    imports = {name: set(_imports(tree, set(paths))) - {name} for name, tree in trees.items()}
    functions = sorted(
        (
            (node.end_lineno or 0) - node.lineno + 1,
            f"{paths[name].relative_to(root)}:{node.lineno} {node.name}",
        )
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    files = sorted((_lines(path), str(path.relative_to(root))) for path in paths.values())
    reached = _reached("babl.scripts.train", imports)
    return {
        "files and lines": {name: f"{files:,} files, {lines:,} lines" for name, (files, lines) in sizes.items()},
        "longest files": [f"{size} {name}" for size, name in files[: -SHOWN - 1 : -1]],
        "longest functions": [f"{size} {name}" for size, name in functions[: -SHOWN - 1 : -1]],
        "functions above 60 lines": sum(size > 60 for size, _ in functions),
        "modules the loop reaches": len(reached),
        "lines the loop reaches": sum(_lines(paths[name]) for name in reached),
        "circles of modules": [" ".join(sorted(circle)) for circle in _circles(imports)],
        f"blocks of {BLOCK} lines in two places": _duplicates(paths.values()),
    }


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(root / folder).with_suffix("").parts])
            yield name.removesuffix(".__init__"), path


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _sizes(folder: Path) -> tuple[int, int]:
    paths = list(folder.rglob("*.py"))
    return len(paths), sum(map(_lines, paths))


def _imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Yields the modules that a file imports, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from {f"{node.module}.{alias.name}" for alias in node.names} & known or {node.module} & known


def _reached(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen, ahead = {start}, [start]
    while ahead:
        new = imports[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def _circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Returns the sets of modules of which each reaches every other."""
    reach = {name: set().union(*(_reached(other, imports) for other in others)) for name, others in imports.items()}
    circles: list[set[str]] = []
    for name in imports:
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and circle not in circles:
            circles.append(circle)
    return circles


def _duplicates(paths: Any) -> int:
    """Returns how many blocks of code, blanks and indentation aside, stand in more than one place."""
    places: dict[tuple[str, ...], set[tuple[Path, int]]] = defaultdict(set)
    for path in paths:
        text = path.read_text(encoding="utf-8").splitlines()
        lines = [line.strip() for line in text if line.strip() and not line.startswith(("import ", "from "))]
        for at in range(len(lines) - BLOCK + 1):
            places[tuple(lines[at : at + BLOCK])].add((path, at))
    twice = {place for found in places.values() if len(found) > 1 for place in found}
    return sum((path, at - 1) not in twice for path, at in twice)  # the first line of each stretch


def main(argv: list[str] | None = None) -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="house.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if not (args.root / "babl").is_dir():
        print(f"house: {args.root} holds no folder babl; name a checkout", file=sys.stderr)
        return 2
    found = measure(args.root)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        rows = [f"{key}: {each}" for key, each in value.items()] if isinstance(value, dict) else value
        print(f"{name}: {len(rows) if not rows else ''}" if isinstance(rows, list) else f"{name}: {value}")
        for row in rows if isinstance(rows, list) else []:
            print(f"  {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
