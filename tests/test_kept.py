"""Converted models are kept, found again whatever they are called, and made again when their files change or a copy is damaged."""

import os

import jax
import numpy as np
import pytest
from test_pretrained import write_gguf

from kvcascade.model import kept, pretrained


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "SMALLEST", 1)
    return write_gguf("llama", tmp_path / "m.gguf")


def copies(tmp_path):
    return list((tmp_path / "cache" / "models").glob("*"))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_kept_model_is_the_one_that_was_converted(file, weights, tmp_path, monkeypatch):
    first = pretrained.load(f"gguf:{file}", weights=weights)
    assert len(copies(tmp_path)) == 1
    monkeypatch.setattr(pretrained, "_load_gguf", None)  # not read again
    again = pretrained.load(f"gguf:{file}", weights=weights)
    assert jax.tree.structure(first.params) == jax.tree.structure(again.params)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert (again.config, again.end, again.name) == (first.config, first.end, first.name)
    assert again.encoding.encode("he said") == first.encoding.encode("he said")


def test_a_changed_file_and_a_damaged_copy_are_read_anew(file, tmp_path):
    first = pretrained.load(f"gguf:{file}", weights="int8")
    [copy] = copies(tmp_path)
    copy.write_bytes(copy.read_bytes()[:1000])
    again = pretrained.load(f"gguf:{file}", weights="int8")
    np.testing.assert_array_equal(first.params["norm"]["scale"], again.params["norm"]["scale"])
    os.utime(file, ns=(1, 1))
    pretrained.load(f"gguf:{file}", weights="int8")
    assert len(copies(tmp_path)) == 2


def test_the_copy_used_longest_ago_makes_room(file, tmp_path, monkeypatch):
    pretrained.load(f"gguf:{file}", weights="float32")
    [old] = copies(tmp_path)
    monkeypatch.setattr(kept, "ROOM", int(1.2 * old.stat().st_size))
    pretrained.load(f"gguf:{file}", weights="bfloat16")
    [new] = copies(tmp_path)
    assert new != old
