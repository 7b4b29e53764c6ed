import contextlib
import dataclasses
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import jax
import jaxtyping
import pytest
from hypothesis import Phase, settings

from kvcascade.kernels import native
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params

# An example costs seconds of compilation, so a failing one is shown as it was drawn; only the thorough profile shrinks it.
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=100, database=None)
settings.register_profile(
    "quick",
    settings.get_profile("thorough"),
    max_examples=10,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
)
settings.register_profile("few", settings.get_profile("quick"), max_examples=3)  # for one more build of the same
settings.register_profile("fuzz", deadline=None, max_examples=20_000, database=None)  # for as long as one has time
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at it again and again while programs are traced."""
    gc.collect()
    gc.freeze()


MAPS, MOST = Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Each program takes mappings of memory, of which Linux gives a process 65,530: a compiler that gets no more ends the process."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def cache_with_kernels() -> Callable[[Path], Path]:
    """Make a folder a cache that is empty but for the C++ kernels: whoever finds none there compiles them, for twenty seconds."""
    library = native.library() if native.ready() else None

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if library:
            shutil.copy(library, folder)
        return folder

    return make


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs as users have them: `make test` has LLVM optimise little, which halves the time that compiling takes."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shapes_alone() -> Callable[[], AbstractContextManager]:
    """Within it types are not looked at: where a program is lowered, JAX fills the cache's dataclasses with descriptions of arrays."""

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            yield
        finally:
            jaxtyping.config.update("jaxtyping_disable", before)

    return within


@pytest.fixture
def unchecked(shapes_alone: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """The whole test within `shapes_alone`."""
    with shapes_alone():
        yield


class Nano(NamedTuple):
    """A model small enough to compile in a second."""

    config: ModelConfig
    params: Params


def nano_model(**changes) -> Nano:
    """Two layers with weights six times as large as at the start of training: attention is peaked, so a mistake shows."""
    shape = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=61, context=32)
    config = dataclasses.replace(shape, **changes)
    params = gpt.init(config, seed=0)
    return Nano(config, jax.tree.map(lambda weight: 6 * weight if weight.ndim > 1 else weight, params))


@pytest.fixture(scope="session")
def nano() -> Nano:
    """A GQA model of two layers, width 32, 4 heads, 61 tokens and a context of 32."""
    return nano_model()


@pytest.fixture(scope="session", params=[4, 2, 1], ids=["mha", "gqa", "mqa"])
def attention_kind(request: pytest.FixtureRequest) -> Nano:
    """The nano model with four, two and one KV heads."""
    return nano_model(kv_heads=request.param)
