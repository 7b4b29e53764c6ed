"""Compilation for a GPU that is named, on a machine that has none: the extra `[aot]`, in a process that was started with `ENVIRONMENT`."""

import contextlib
import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kvcascade.kernels import backend

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu,cuda",
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
"""What has to stand in the environment before JAX is imported, so that the CUDA plug-in loads without a GPU, and really compiles."""


@dataclasses.dataclass(frozen=True)
class GPU:
    """A card as XLA's compiler describes it: bytes, bytes per second, hertz."""

    name: str
    text: str
    """The description that the compiler takes, a GpuTargetConfigProto as text."""

    def number(self, field: str) -> float:
        """A figure of the description by its name there, 0 if it has none."""
        found = re.search(rf"\b{field}: ([\d.e+]+)", self.text)
        return float(found[1]) if found else 0.0

    @property
    def full_name(self) -> str:
        """As the compiler calls it."""
        found = re.search(r'device_description_str: "([^"]*)"', self.text)
        return found[1] if found else self.name

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = self.number("major"), self.number("minor")
        return int(major), int(minor)

    @property
    def memory(self) -> int:
        return int(self.number("device_memory_size"))

    @property
    def bandwidth(self) -> float:
        return self.number("memory_bandwidth")

    @property
    def multiprocessors(self) -> int:
        return int(self.number("core_count"))

    @property
    def clock(self) -> float:
        return self.number("clock_rate_ghz") * 1e9

    @property
    def shared_memory(self) -> int:
        """What one block may have of it."""
        return int(self.number("shared_memory_per_block_optin"))


KNOWN = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200 141GB HBM3e",
    "b200": "NVIDIA B200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40": "NVIDIA A100-SXM4-40GB",
    "a6000": "NVIDIA RTX A6000",
    "rtx6000pro": "NVIDIA RTX PRO 6000 Blackwell",
    "v100": "Tesla V100-SXM2-16GB",
}
"""Cards whose description comes with the compiler."""

# Cards that the compiler has no description of: an A6000's, with the numbers of their data sheets. Pallas and Triton know some of them
# only by the name of another card with the same instructions, which then stands before theirs.
DERIVED: dict[str, dict[str, Any]] = {
    "rtx3060": {"device_description_str": '"NVIDIA A10 (for GeForce RTX 3060)"', "core_count": 28, "memory_bandwidth": 360_000_000_000,
                "device_memory_size": 12288 << 20, "l2_cache_size": 3 << 20, "clock_rate_ghz": 1.777, "minor": 6},
    "rtx3090": {"device_description_str": '"NVIDIA A10 (for GeForce RTX 3090)"', "core_count": 82, "memory_bandwidth": 936_000_000_000,
                "device_memory_size": 24576 << 20, "l2_cache_size": 6 << 20, "clock_rate_ghz": 1.695, "minor": 6},
    "rtx4090": {"device_description_str": '"NVIDIA GeForce RTX 4090"', "core_count": 128, "memory_bandwidth": 1_008_000_000_000,
                "device_memory_size": 24564 << 20, "l2_cache_size": 72 << 20, "clock_rate_ghz": 2.52, "minor": 9},
    "l4": {"device_description_str": '"NVIDIA L4"', "core_count": 58, "memory_bandwidth": 300_000_000_000,
           "device_memory_size": 23034 << 20, "l2_cache_size": 48 << 20, "clock_rate_ghz": 2.04, "minor": 9},
}  # fmt: skip


MEMORY = {
    "h100": 84_942_979_072,
    "h200": 151_397_597_184,
    "b200": 191_514_411_008,
    "a100": 85_100_068_864,
    "a100-40": 42_331_013_120,
    "a6000": 51_041_271_808,
    "rtx6000pro": 103_079_215_104,
    "v100": 16_935_682_048,
} | {name: figures["device_memory_size"] for name, figures in DERIVED.items()}
"""Bytes of every card, as the compiler's description has them: known without the compiler too."""


MISSING = "compiling for a GPU needs more packages: pip install 'kvcascade[aot]'"


class NotInstalled(Exception):
    """The extra `[aot]` is missing."""


@functools.cache
def gpu(name: str) -> GPU:
    """A card by its short name. Raises KeyError for one that is neither in KNOWN nor in DERIVED, NotInstalled without the compiler."""
    if name not in DERIVED:
        return GPU(name, _descriptions()[KNOWN[name]])
    text = _descriptions()[KNOWN["a6000"]]
    for field, value in DERIVED[name].items():
        text = re.sub(rf"\b{field}: (\"[^\"]*\"|\S+)", f"{field}: {value}", text, count=1)
    return GPU(name, text)


@functools.cache
def _descriptions() -> dict[str, str]:
    """The cards' descriptions, which the plug-in's library carries word for word."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins and plugins.submodule_search_locations else []
    libraries = [library for folder in folders for library in Path(folder).glob("*/xla_cuda_plugin.so")]
    if not libraries:
        raise NotInstalled(MISSING)
    found = re.findall(rb'(gpu_device_info \{[\t\n -~]+?device_description_str: "([^"]+)")', libraries[0].read_bytes())
    return {name.decode(): text.decode() for text, name in found}


@contextlib.contextmanager
def compiling_for(card: GPU) -> Iterator[jax.sharding.Mesh]:
    """A mesh of one such card, with `backend.capability` its own."""
    from jax.experimental.mosaic.gpu import utils as mosaic

    mesh = topologies.make_mesh(
        topologies.get_topology_desc(platform="cuda", target_config=card.text, topology="1x1x1"), (1,), ("d",)
    )
    # Mosaic asks an abstract device for an attribute that it does not have, and then takes every card for an H100.
    inferred, mosaic._infer_arch = mosaic._infer_arch, lambda: card.capability
    try:
        with backend.target(card.capability), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield mesh
    finally:
        mosaic._infer_arch = inferred


def compile_for(
    function: Callable, arguments: tuple, card: GPU, donate: tuple[int, ...] = (), options: dict | None = None
) -> jax.stages.Compiled:
    """Compile a function of arrays, given by shape and dtype (`jax.eval_shape`), for a card."""
    with compiling_for(card) as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        traced = jax.jit(function, donate_argnums=donate).trace(*jax.tree.map(shaped, arguments))
        return traced.lower(lowering_platforms=("cuda",)).compile(options)
