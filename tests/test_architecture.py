"""The house keeps its plan: imports point down, configurations load, help is instant."""

import ast
from pathlib import Path

import pytest

from babl.config import load_config
from babl.scripts.experiment import ExperimentConfig
from babl.scripts.train import TrainConfig

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"kernels"},
    {"ops", "kernel_choice", "rng", "text", "distributed", "config", "errors", "files"},
    {"models", "data"},
    {"generation", "training"},
    {"evaluation", "experiment"},
    {"scripts", "web"},
    {"commands"},
    {"cli"},
]


def room(module):
    """`babl.data.squad` -> `data`; None outside of babl."""
    parts = module.split(".")
    return parts[1] if parts[0] == "babl" and len(parts) > 1 else None


def modules():
    for folder, package in (
        (ROOT / "babl", "babl"),
        (ROOT / "scripts", "babl.scripts"),
        (ROOT / "kernels", "babl.kernels"),
    ):
        for path in folder.rglob("*.py"):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_imports_stay_in_their_package_or_go_down():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for name, tree in modules():
        for node in ast.walk(tree):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for other in filter(None, map(room, filter(None, imported))):
                here = room(name)
                upwards = here in floor and floor[other] > floor[here]
                sideways = {here, other} == {"scripts", "web"}
                if upwards or sideways:
                    wrong.append(f"{name} imports babl.{other}")
    assert not wrong


def imported_modules(tree, known):
    """Yields the modules that an import anywhere in the file names, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            yield from inner or {node.module} & known


def test_no_modules_import_each_other_in_a_circle():
    trees = {name.removesuffix(".__init__"): tree for name, tree in modules()}
    edges = {name: set(imported_modules(tree, set(trees))) - {name} for name, tree in trees.items()}
    finished = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            finished.add(name)

    for name in edges:
        visit(name, [])


# Started as processes of their own, which nothing of the one that names them is imported into.
PROCESSES = {"babl.cli", "babl.scripts.train"}


def test_modules_named_in_strings_stay_on_their_floor_or_are_processes():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    known = {name.removesuffix(".__init__") for name, _ in modules()}
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in known and "." in node.value:
                here, there = room(name), room(node.value)
                upwards = here in floor and floor[there] > floor[here]
                assert not upwards or node.value in PROCESSES, f"{name} names {node.value}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_is_short(path):
    load_config(ExperimentConfig if path.parent.name == "experiments" else TrainConfig, path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_the_loop_stays_short():
    source = (ROOT / "scripts" / "train.py").read_text(encoding="utf-8")
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.While)]
    assert len(source.splitlines()) <= 260
    assert max(loop.end_lineno - loop.lineno for loop in loops) <= 90
