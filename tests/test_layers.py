import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "cache": {"cache", "kernels"},
    "model": {"model", "cache", "kernels"},
    "train": {"train", "model", "cache", "kernels"},
    "eval": {"eval", "model", "cache", "kernels", "train.checkpoint"},
    "scripts": {"scripts", "eval", "train", "model", "cache", "kernels"},
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
    """kernels <- cache <- model <- train, eval <- scripts; eval takes from train only its checkpoints."""
    allowed = MAY_IMPORT[path.parent.name]
    for name in imports(path):
        folder, module = (name.split(".") + [""])[:2]
        assert folder in allowed or f"{folder}.{module}" in allowed, f"{path.parent.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_annotations_are_not_strings(path: Path) -> None:
    """`from __future__ import annotations` would switch the checks of array shapes off."""
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in nodes)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_are_flat(folder: str) -> None:
    """A folder holds modules, never packages, and the root is no package."""
    assert {path.parent for path in MODULES if ROOT / folder in path.parents} == {ROOT / folder}
    assert not (ROOT / "__init__.py").exists()
