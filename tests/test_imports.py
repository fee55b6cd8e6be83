"""Imports point one way, and the heavy ones are where they should be."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_dgemma

ROOT = Path(mlx_dgemma.__file__).parent

# lower may not import higher; files of one line may import each other
ORDER = [
    ["errors"],
    ["config"],
    ["cache"],
    ["layers"],
    ["model"],
    ["draws", "checkpoint", "prompt", "transcript"],
    ["sampling"],
    ["denoise", "memory"],
    ["loading"],
    ["decoding"],
    ["response", "command"],
    ["display"],
    ["generate"],
    ["parity"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imported(path: Path, runtime_only: bool = True) -> set[str]:
    """Absolute dotted names that a file imports, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    skipped = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    ignored = {child for block in skipped for child in ast.walk(block)} if runtime_only else set()
    package = ["mlx_dgemma", *path.relative_to(ROOT).parts[:-1]]
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
    return name.split(".")[1] if "." in name else "__init__"


def test_every_file_has_its_place():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} == set(RANK)


def test_imports_point_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imported(path):
            if name.split(".")[0] == "mlx_dgemma" and RANK[module_of(name)] > RANK[here]:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_torch_is_imported_for_recording_alone():
    users = {
        p.relative_to(ROOT).as_posix()
        for p in ROOT.rglob("*.py")
        if any(n.split(".")[0] == "torch" for n in imported(p))
    }
    assert users == {"parity/reference.py"}


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("mlx.core", "mlx_lm", "torch", "transformers")
    code = f"import sys, mlx_dgemma; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_functions_and_submodules_at_once():
    import mlx_dgemma.generate as submodule_or_function

    assert callable(mlx_dgemma.generate)
    assert submodule_or_function is mlx_dgemma.generate
    assert callable(sys.modules["mlx_dgemma.generate"].main)
