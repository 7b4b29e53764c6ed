"""Programs kept for the next start: the same tokens without a trace, and never a program of something else."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kvcascade.cache.spec import parse
from kvcascade.kernels.files import make_room
from kvcascade.model import generate, gpt, programs
from kvcascade.model.sampling import Sampling

SPEC = parse("recent 8@int8")


def tokens(nano, compiled=programs.traced, prompts=((3, 1, 4, 1, 5), (9, 2)), params=None, **changes):
    config = dataclasses.replace(nano.config, **changes)
    if compiled is programs.kept:
        jax.clear_caches()  # as in another process; XLA writes down no sort that has run in this one
    cache = generate.empty_cache(config, SPEC, len(prompts), 24)
    sampling = Sampling(temperature=0.8, seed=5)
    steps = generate.generate(config, params or nano.params, cache, [*map(list, prompts)], 18, sampling, compiled)
    return np.concatenate([new for new, _ in steps])


# JAX writes down a program's arguments by trees of their shapes.
pytestmark = pytest.mark.usefixtures("unchecked", "cache_with_kernels")


@pytest.fixture
def folder(tmp_path, monkeypatch, cache_with_kernels):
    monkeypatch.setenv("KVCASCADE_CACHE", str(cache_with_kernels(tmp_path / "cache")))
    programs._circumstances.cache_clear()
    yield tmp_path / "cache" / "executables"
    programs._circumstances.cache_clear()


def traces():
    return [step._cache_size() for step in (generate.begin_step, generate.decode_steps)]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_the_second_start_traces_nothing(nano, folder, monkeypatch):
    wanted, before = tokens(nano), traces()
    np.testing.assert_array_equal(tokens(nano, programs.kept), wanted)
    assert sorted(path.name.rpartition("-")[0] for path in folder.iterdir()) == ["begin_step", "decode_steps"]
    jax.clear_caches()

    def never(*_, **__):
        raise AssertionError("traced again")

    monkeypatch.setattr(gpt, "step", never)
    monkeypatch.setattr(gpt, "first_step", never)
    np.testing.assert_array_equal(tokens(nano, programs.kept), wanted)
    assert sum(traces()) <= sum(before)
    # Other weights of the same shapes are other arguments, not another program.
    other = jax.tree.map(lambda x: 1.5 * x, nano.params)
    assert (tokens(nano, programs.kept, params=other) != wanted).any()


@pytest.mark.slow
def test_what_jax_keeps_itself_is_not_kept_again(nano, folder, tmp_path):
    """XLA's executable that comes out of JAX's cache would lack its functions when it is kept once more."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    try:
        for name, value in zip(names, (str(tmp_path / "jax"), 0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.clear_caches()
        wanted = tokens(nano)
        assert any("begin_step" in path.name for path in (tmp_path / "jax").iterdir())
        for _ in range(2):
            jax.clear_caches()
            np.testing.assert_array_equal(tokens(nano, programs.kept), wanted)
        assert jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.slow
def test_another_program_has_another_name(nano, folder, monkeypatch):
    there = lambda: set(folder.iterdir())
    tokens(nano, programs.kept)
    first = there()
    tokens(nano, programs.kept, norm_eps=1e-4)
    second = there()
    assert len(second) == 4
    tokens(nano, programs.kept, prompts=((3, 1, 4), (1, 5), (9, 2)))
    third = there()
    assert len(third) == 6
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=false")
    programs._circumstances.cache_clear()
    tokens(nano, programs.kept)
    assert len(there()) == 8 and first < second < third < there()


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"no pickle", b"half"])
def test_a_damaged_file_is_made_again(nano, folder, content):
    wanted = tokens(nano, programs.kept)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == b"half" else content)
    np.testing.assert_array_equal(tokens(nano, programs.kept), wanted)
    assert all(path.stat().st_size > 1000 for path in folder.iterdir())


def test_where_nothing_can_be_written(nano, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "file"))
    np.testing.assert_array_equal(tokens(nano, programs.kept), tokens(nano))
    assert "no program is kept" in caplog.text


def test_those_not_used_for_longest_go(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (100 - age, 100 - age))
    make_room(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    make_room(tmp_path / "missing", 0)
