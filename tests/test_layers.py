import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "cache": {"cache", "kernels"},
    "model": {"model", "cache", "kernels"},
    "train": {"train", "model", "cache", "kernels"},
    "eval": {"eval", "serve", "model", "cache", "kernels", "train.checkpoint"},
    "serve": {"serve", "model", "cache", "kernels"},
    "api": {"eval", "serve", "train", "model", "cache", "kernels"},
    "scripts": {"scripts", "kvcascade", "serve", "eval", "train", "model", "cache", "kernels"},
}
MODULES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """The modules and names that a file imports from anywhere in it, `train.checkpoint` for `kvcascade.train.checkpoint`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("kvcascade.") for name in names if name.split(".")[0] == "kvcascade")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    """kernels <- cache <- model <- train, eval, serve <- api <- scripts; eval takes from train only its checkpoints."""
    top = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        folder, module = (name.split(".") + [""])[:2]
        assert folder in MAY_IMPORT[top] or f"{folder}.{module}" in MAY_IMPORT[top], f"{top} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_annotations_are_not_strings(path: Path) -> None:
    """`from __future__ import annotations` would switch the checks of array shapes off."""
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in nodes)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_have_one_level_of_rooms(folder: str) -> None:
    """A folder holds modules or rooms of modules, each of which says what is in it and is installed, and the root is no package."""
    mine = [path.relative_to(ROOT) for path in MODULES if ROOT / folder in path.parents]
    assert max(len(path.parts) for path in mine) <= 3
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for room in {path.parent for path in mine}:
        assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert ("kvcascade" if folder == "api" else f"kvcascade.{'.'.join(room.parts)}") in packages
    assert not (ROOT / "__init__.py").exists()
