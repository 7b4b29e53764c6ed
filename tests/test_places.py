"""Where pretrained models are: names, folders, files in parts, and what is fetched of a repository."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tiny_models
from hub import Hub
from test_pretrained import write_gguf

from kvcascade.cache.errors import BadInput
from kvcascade.model import places, pretrained


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf("llama", tmp_path_factory.mktemp("whole") / "m.gguf")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same model in several files, as the gguf library splits one."""
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=8))
        write_gguf("llama", tmp_path / "m.gguf")
    return sorted(tmp_path.glob("*.gguf"))


def refused(name: str, *words: str) -> None:
    with pytest.raises(BadInput) as caught:
        pretrained.load(name)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_in_parts_is_put_together(whole: Path, parts: list[Path]) -> None:
    """Whichever part is named, and the folder too: the same tensors as in one file."""
    assert [path.name for path in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    expected = pretrained.load(f"gguf:{whole}")
    for name in (f"gguf:{parts[0]}", str(parts[2]), str(parts[0].parent)):
        model = pretrained.load(name)
        assert model.config == expected.config == pretrained.shape(name)
        for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_parts_that_are_missing_or_mixed_up_are_named(whole: Path, parts: list[Path]) -> None:
    third = parts[2].read_bytes()
    parts[2].rename(parts[2].with_name("other.bin"))
    refused(str(parts[0]), "m-00001-of-00003.gguf: there is no m-00003-of-00003.gguf")
    parts[2].write_bytes(parts[1].read_bytes())
    refused(str(parts[0]), "m-00003-of-00003.gguf is part 2 of 3, and not what its name says")
    alone = parts[0].parent / "alone"
    alone.mkdir()
    (alone / "x.gguf").write_bytes(parts[0].read_bytes())
    refused(str(alone / "x.gguf"), "x.gguf is part 1 of 3; its name should end in -00001-of-00003.gguf")
    parts[2].write_bytes(third)
    parts[0].unlink()
    refused(str(parts[1]), "there is no m-00001-of-00003.gguf")


def test_files_and_folders_by_their_bare_names(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    monkeypatch.chdir(tmp_path)
    for name in ("gguf:~/m.gguf", "~/m.gguf", "~", str(whole)):
        assert places.is_pretrained(name) and places.locate(name) == whole
    refused("none.gguf", "none.gguf: No such file or directory")
    refused("gguf:none", "none: No such file or directory")
    refused("gguf:~/none", f"{whole.parent}/none: No such file or directory")
    folder = tiny_models.write("llama", tmp_path / "m")
    refused("m/model.safetensors", "m/model.safetensors has the weights alone; name the folder, m,")
    assert places.locate("m") == Path("m") and places.is_pretrained("m") and not places.is_pretrained("none")
    (folder / "config.json").unlink()
    refused("gguf:m", "m lacks config.json, and has no GGUF files")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"")
    refused("m", "m lacks config.json, and has 2 GGUF files: a.gguf, b.gguf; name one of them")


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ASK = """
import sys
from kvcascade.cache.errors import BadInput
from kvcascade.model import pretrained
for line in sys.stdin:
    what, name = line.split()
    try:
        print((pretrained.shape if what == "shape" else pretrained.load)(name) and "loaded", flush=True)
    except BadInput as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Hub:
    """Repositories as people have them."""
    root = tmp_path_factory.mktemp("hub")
    both = tiny_models.write("llama", root / "a" / "both", shards=2)
    tiny_models.write("llama", root / "a" / "one")
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "onnx/config.json",
        "onnx/model.onnx",
        "model.fp16.safetensors",
        "README.md",
    ):
        for folder in (both, root / "a" / "one"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
    (both / "tokenizer_config.json").write_text("{}")
    old = tiny_models.write("llama", root / "a" / "old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    (root / "a" / "gguf").mkdir()
    (root / "a" / "gguf" / "m.Q8.gguf").write_bytes(whole.read_bytes())
    return Hub(root)


@contextlib.contextmanager
def asking(hub: Hub, home: Path) -> Iterator[Callable[[str, str], tuple[str, list[str]]]]:
    """A process that can be asked: what it prints, and the files that were fetched."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command, none = [sys.executable, "-c", ASK], subprocess.DEVNULL
    with subprocess.Popen(command, env=os.environ | settings, stdin=-1, stdout=-1, stderr=none, text=True) as child:
        assert child.stdin and child.stdout
        given, answers = child.stdin, child.stdout

        def asked(what: str, name: str) -> tuple[str, list[str]]:
            hub.fetched.clear()
            print(what, name, file=given, flush=True)
            return answers.readline().strip(), sorted(hub.fetched)

        yield asked


@pytest.mark.slow
def test_of_a_repository_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """config.json for a shape; then one copy of the weights: the shards that the index names, or the one file."""
    with asking(hub, tmp_path) as asked:
        assert asked("shape", "a/both") == ("loaded", ["config.json"])
        beside = ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
        assert asked("load", "a/both") == ("loaded", sorted([*SHARDS, *beside]))
    with asking(hub, tmp_path) as asked:
        assert asked("load", "a/both") == ("loaded", [])
        assert asked("load", "a/one") == ("loaded", ["config.json", "model.safetensors", "tokenizer.json"])


def test_a_repository_in_other_formats_says_which(hub: Hub, tmp_path: Path) -> None:
    with asking(hub, tmp_path) as asked:
        said, fetched = asked("load", "a/old")
        assert (
            said
            == "a/old has no model.safetensors, only pytorch_model.bin; that format is not read, convert it to model.safetensors"
        )
        assert not [name for name in fetched if "bin" in name]
        said, fetched = asked("load", "a/gguf")
        assert said == "a/gguf has no model.safetensors, but GGUF files; name one, as a/gguf:m.Q8.gguf" and not fetched
        assert asked("load", "a/gguf:m.Q8.gguf") == ("loaded", ["m.Q8.gguf"])
        assert "a/gguf has no x.gguf, but GGUF files; name one" in asked("load", "a/gguf:x.gguf")[0]
        assert asked("load", "a/none")[0].startswith("no model a/none: no folder of that name, and the hub says: ")
