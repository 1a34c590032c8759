"""Imports go one way, and what is heavy is loaded only when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import featherweight

ROOT = Path(featherweight.__file__).parent

# Each part of the package and the parts it may import. A new part must say here where it stands.
BASE = {"core", "device", "errors", "quantities", "whole"}
GRAPH = BASE | {"graph"}
MEASURED = GRAPH | {"runtime", "data", "stats"}
SEARCHED = MEASURED | {"recover", "techniques", "search"}
ALLOWED = {
    "errors": set(),
    "device": set(),
    "core": {"errors", "device"},
    "quantities": {"errors"},
    "whole": {"errors"},
    "runtime": BASE,
    "graph": BASE,
    "data": BASE,
    "stats": MEASURED,
    "recover": MEASURED,
    "techniques": MEASURED | {"recover"},
    "search": SEARCHED,
    "report": BASE,
    "embeddings": SEARCHED,
    "words": SEARCHED | {"embeddings"},
    "inspection": SEARCHED | {"edge"},
    "target_view": SEARCHED | {"inspection", "edge"},
    "channel_view": GRAPH,
    "layer_view": SEARCHED,
    "pipeline": SEARCHED | {"inspection", "report", "convert", "learn", "edge"},
    "testing": SEARCHED,
    "demo": SEARCHED | {"pipeline", "inspection", "report"},
    "convert": GRAPH | {"runtime", "data"},
    "learn": SEARCHED | {"convert"},
    "edge": MEASURED,
    "cli": SEARCHED
    | {"pipeline", "inspection", "target_view", "channel_view", "layer_view", "report", "demo", "embeddings", "words"}
    | {"convert", "learn", "edge"},
    "__init__": set(),
}


def source_files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but what stands under `if TYPE_CHECKING`, which never runs."""
    for child in ast.iter_child_nodes(node):
        if not for_types_only(child):
            yield child
            yield from statements(child)


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Absolute names of imported modules with their lines, in functions too."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == "featherweight":
                yield from ((f"featherweight.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is a new part: say in ALLOWED what it may import"
    wrong = []
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "featherweight" and len(parts) > 1 and parts[1] not in ALLOWED[part] | {part}:
            wrong.append(f"line {line}: {name}")
    assert not wrong, f"{part} may import {sorted(ALLOWED[part])}, but has {wrong}"


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_their_own_parts_import_runtime_torch_and_rich(path: Path) -> None:
    homes = {
        "onnxruntime": {"runtime/ort.py"},
        "torch": {p.relative_to(ROOT).as_posix() for p in source_files() if part_of(p) in ("learn", "convert")},
        "rich": {p.relative_to(ROOT).as_posix() for p in source_files() if part_of(p) in ("report", "cli")},
        "click": {p.relative_to(ROOT).as_posix() for p in source_files() if part_of(p) == "cli"},
    }
    here = path.relative_to(ROOT).as_posix()
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
        home = homes.get(name.split(".")[0])
        assert home is None or here in home, f"line {line} imports {name}; only {sorted(home)} may"


def loaded_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()}


HEAVY = {"torch", "onnxruntime", "rich", "scipy", "numpy", "onnx", "onnx_ir", "PIL", "tokenizers"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import featherweight") & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["inspect", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"sys.argv = ['featherweight', *{arguments!r}]\n"
        "from featherweight.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
    )
    assert not loaded_after(code) & HEAVY


def test_public_names_are_all_there() -> None:
    assert set(featherweight.__all__) <= set(dir(featherweight))
    for name in featherweight.__all__:
        assert getattr(featherweight, name) is not None
