"""Imports point one way, and the heavy ones are where they should be."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_dgemma

ROOT = Path(mlx_dgemma.__file__).parent
# at the top of the repository, subpackages once installed
OUTSIDE = {name: ROOT.parent / name for name in ("convert", "drafter")}

# lower may not import higher; files of one line may import each other
ORDER = [
    ["errors", "version"],
    ["config", "files", "folders"],
    ["options", "cache"],
    ["layers"],
    ["model"],
    ["draws", "filters", "checkpoint", "prompt", "transcript", "cells"],
    ["sampling"],
    ["denoise", "memory"],
    ["loading", "drafter"],
    ["decoding"],
    ["response", "command"],
    ["convert"],
    ["display"],
    ["film"],
    ["generate"],
    ["drafter.training"],
    ["parity"],
    ["check"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def sources() -> dict[str, Path]:
    """ "decoding/causal.py" -> where it is."""
    found = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py")}
    for name, folder in OUTSIDE.items():
        found |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.py")}
    return found


def imported(name: str, path: Path) -> set[str]:
    """Absolute dotted names that a file imports, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    skipped = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    ignored = {child for block in skipped for child in ast.walk(block)}
    package = ["mlx_dgemma", *name.split("/")[:-1]]
    names = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *([node.module] if node.module else [])]
            names |= {".".join([*source, *([alias.name] if len(source) == 1 else [])]) for alias in node.names}
    return names


def module_of(name: str) -> str:
    """Of a dotted name, the entry of ORDER."""
    parts = name.split(".")[1:] or ["__init__"]
    whole = ".".join(parts[:2])
    return whole if whole in RANK else parts[0]


def place_of(file: str) -> str:
    return module_of("mlx_dgemma." + file.removesuffix(".py").replace("/", "."))


def test_every_file_has_its_place():
    assert {place_of(file) for file in sources()} == set(RANK)


def test_imports_point_one_way():
    wrong = []
    for file, path in sources().items():
        here = place_of(file)
        for name in imported(file, path):
            if name.split(".")[0] == "mlx_dgemma" and RANK[module_of(name)] > RANK[here]:
                wrong.append(f"{file} imports {name}")
    assert not wrong


def test_decoding_knows_drafters_by_their_protocol_alone():
    names = {name for file, path in sources().items() if file.startswith("decoding/") for name in imported(file, path)}
    assert {name for name in names if name.startswith("mlx_dgemma.drafter")} == {"mlx_dgemma.drafter.protocol"}


def test_torch_is_imported_for_recording_alone():
    users = {file for file, path in sources().items() if any(n.split(".")[0] == "torch" for n in imported(file, path))}
    assert users == {"parity/reference.py"}


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("mlx.core", "mlx_lm", "torch", "transformers")
    code = f"import sys, mlx_dgemma; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_functions_and_submodules_at_once():
    import mlx_dgemma.convert.command
    import mlx_dgemma.generate as submodule_or_function

    assert callable(mlx_dgemma.generate) and callable(mlx_dgemma.convert)
    assert submodule_or_function is mlx_dgemma.generate
    assert callable(sys.modules["mlx_dgemma.generate"].main)
    assert callable(sys.modules["mlx_dgemma.convert.command"].main)
