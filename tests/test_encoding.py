"""Text is read and written in UTF-8, whatever the locale is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).parent.parent
FOLDERS = ("api", "cache", "docs", "eval", "kernels", "model", "scripts", "train")
PLACE = {"read_text": 0, "write_text": 1, "open": 2, "fdopen": 3}
"""Calls that may open a text, and which argument of a method is the encoding."""


def in_the_locale(call: ast.Call) -> bool:
    """Whether a call opens a text and does not say in which encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
    if given.get("text") == "True":
        return "encoding" not in given
    if name == "TemporaryFile" or name not in PLACE or any(isinstance(each, ast.Starred) for each in call.args):
        return (
            name == "TemporaryFile"
            and "b" not in "".join(map(ast.unparse, call.args))
            and bool(call.args)
            and "encoding" not in given
        )
    if name in ("open", "fdopen"):
        words = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        binary = any(set(word) <= set("rwabx+") and "b" in word for word in words) or "b" in given.get("mode", "")
        computed = any(isinstance(each, ast.IfExp) for each in call.args)
        return not binary and not computed and "encoding" not in given and ast.unparse(call.func) not in ("os.open",)
    return len(call.args) <= PLACE[name] and "encoding" not in given


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_says_its_encoding(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{path.name}:{call.lineno}" for call in calls if in_the_locale(call)]
    assert not found


def test_the_look_at_calls_sees_what_is_missing() -> None:
    bad = [
        "p.read_text()",
        "p.write_text(x)",
        "open(f)",
        "p.open('a')",
        "run(c, text=True)",
        "os.fdopen(1, 'w')",
        "TemporaryFile('w+')",
    ]
    good = [
        "p.read_text('utf-8')",
        "p.write_text(x, 'utf-8')",
        "open(f, 'rb')",
        "p.open('a', encoding='utf-8')",
        "run(c, text=True, encoding='utf-8')",
    ]
    look = lambda text: in_the_locale(next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)))
    assert [look(text) for text in bad + good] == [True] * len(bad) + [False] * len(good)


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["POSIX", "ascii output"],
)
def test_a_locale_of_ascii(tmp_path: Path, locale: dict[str, str]) -> None:
    """Files are read as elsewhere, and what cannot be printed is replaced; bytes that are no UTF-8 are a prompt as well."""
    folder = tiny_models.write("llama", tmp_path / "m")
    for prompt, tokens in ((b"caf\xe9", 6), ("café".encode(), 5)):
        command = [
            sys.executable,
            "-c",
            "from kvcascade.scripts.cli import main; main()",
            "generate",
            "--model",
            str(folder),
            "--tokens",
            "1",
        ]
        done = subprocess.run([*command, "--prompt", prompt], capture_output=True, env=os.environ | locale)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(b"caf?") and f"of {tokens} tokens".encode() in done.stderr
