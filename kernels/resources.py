"""What a kernel asks of a card: registers, spills, shared memory and instructions, from what the three compilers write down.

XLA writes its fusions' PTX and Triton and Pallas (Mosaic) that of their kernels, each to a place of its own; ptxas and nvdisasm, which come
with Triton, do the rest. The process has to be started with `environment`.
"""

import dataclasses
import functools
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kvcascade.kernels import aot, backend


def environment(folder: Path) -> dict[str, str]:
    """What has to stand in the environment before JAX is imported, so that the compilers write into a folder."""
    mosaic = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "RESOURCES")}
    return (
        aot.ENVIRONMENT | mosaic | {"MOSAIC_GPU_DUMP_TO": f"{folder}/mosaic", "JAX_TRITON_DUMP_DIR": f"{folder}/triton"}
    )


class Code(NamedTuple):
    """A kernel's machine instructions by name: those of its longest loop, and all others; loops that only wait are left out."""

    loop: Counter[str]
    rest: Counter[str]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel; bytes, and per block where it says so."""

    name: str
    compiler: str
    """`xla`, `triton` or `mosaic`."""
    registers: int
    """Per thread."""
    spilled: int
    """Bytes that a thread stores to or loads from local memory for want of registers."""
    shared_memory: int
    """Per block."""
    threads: int
    """Per block."""
    blocks: int
    code: Code

    def per_multiprocessor(self, card: aot.GPU) -> int:
        """Blocks that fit on one multiprocessor at once, by registers, shared memory and threads; 0 if not even one does."""
        if self.shared_memory > card.shared_memory:
            return 0
        warps = math.ceil(self.threads / 32)
        a_warp = math.ceil(self.registers * 32 / 256) * 256  # registers are handed out 256 at a time
        # Older descriptions leave these two out.
        memory = self.shared_memory + (card.number("reserved_shared_memory_per_block") or 1024)
        most = card.number("max_blocks_per_multiprocessor") or {(8, 6): 16, (8, 9): 24}.get(card.capability, 32)
        return int(
            min(
                card.number("registers_per_core_limit") // (a_warp * warps),
                card.number("shared_memory_per_core") // memory,
                card.number("threads_per_core_limit") // (warps * 32),
                most,
            )
        )


def compile_for(
    function: Callable, arguments: tuple, card: aot.GPU, folder: Path, donate: tuple[int, ...] = ()
) -> tuple[jax.stages.Compiled, list[Kernel]]:
    """`aot.compile_for`, and the kernels that were compiled on the way, XLA's only where there are no others.

    `folder` is that of `environment`.
    """
    for compiler in ("xla", "triton", "mosaic"):
        shutil.rmtree(folder / compiler, ignore_errors=True)
        (folder / compiler).mkdir(parents=True)
    jax.clear_caches()  # a kernel that is known is not compiled, and not written down, again
    options = {"xla_dump_to": str(folder / "xla"), "xla_dump_emitter_re": "ptx"}
    compiled = aot.compile_for(function, arguments, card, donate, options)
    blocks = grids(function, arguments, card)
    ours = [*_triton(folder / "triton"), *_mosaic(folder / "mosaic")]
    ours = [dataclasses.replace(kernel, blocks=blocks[kernel.name]) for kernel in ours]
    return compiled, ours or list(_xla(folder / "xla"))


def grids(function: Callable, arguments: tuple, card: aot.GPU) -> Counter[str]:
    """Blocks that a function's Triton and Mosaic kernels are launched with on a card, by the kernel's name."""
    found: Counter[str] = Counter()
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with backend.target(card.capability):
        program = jax.jit(function).trace(*shaped).lojax.jaxpr
    for equation in equations(program):
        match equation.primitive.name:
            case "triton_kernel_call":
                found[equation.params["fn"].__name__] += math.prod(equation.params["grid"])
            case "mpmd_map":
                found[equation.params["name"]] += math.prod(math.prod(m.grid) for m in equation.params["meshes"])
    return found


def equations(program: Any) -> Iterator[Any]:
    """The equations of a traced program, and of the programs inside them."""
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _xla(folder: Path) -> Iterator[Kernel]:
    product = lambda text: math.prod(map(int, text.split(",")))
    launched = {}
    for thunks in folder.glob("*thunk_sequence.txt"):
        for name, grid, block, memory in re.findall(
            r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)", thunks.read_text("utf-8")
        ):
            launched[name] = product(grid), product(block), int(memory)
    for ptx in sorted(folder.glob("*.ptx")):
        for kernel in assemble(ptx.read_text("utf-8"), "xla"):
            blocks, threads, memory = launched.get(kernel.name, (0, kernel.threads, 0))
            memory += kernel.shared_memory
            yield dataclasses.replace(kernel, blocks=blocks, threads=threads, shared_memory=memory)


def _triton(folder: Path) -> Iterator[Kernel]:
    for ptx in sorted(folder.glob("*/*.ptx")):
        memory = int(_found(r"shared_mem_bytes: (\d+)", ptx.with_suffix(".compile_info").read_text("utf-8")))
        for kernel in assemble(ptx.read_text("utf-8"), "triton"):
            yield dataclasses.replace(kernel, shared_memory=memory)


def _mosaic(folder: Path) -> Iterator[Kernel]:
    for ptx in sorted(folder.glob("*.ptx")):
        resources = ptx.with_suffix(".resources.txt").read_text("utf-8")
        barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
        memory = int(_found(r"smem_scratch_bytes=(\d+)", resources)) + sum(8 * int(n) * int(m) for n, m in barriers)
        for kernel in assemble(ptx.read_text("utf-8"), "mosaic"):
            name = kernel.name.removesuffix("_mosaic_gpu_kernel")
            yield dataclasses.replace(kernel, name=name, shared_memory=memory)


def assemble(ptx: str, compiler: str = "") -> list[Kernel]:
    """The kernels of a PTX text, assembled for the card that it names; their shared memory is the static part only."""
    target = _found(r"^\.target (sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, "utf-8")
        # That of CUDA 12, as in the plug-in, reads up to PTX 8.8; Mosaic writes 9.0 where the machine has a newer one.
        version = tuple(map(int, _found(r"^\.version ([\d.]+)", ptx).split(".")))
        assembler = "ptxas" if version <= (8, 8) else "ptxas-blackwell"
        said = _tool(assembler, "-v", f"-arch={target}", str(source), "-o", str(binary)).stderr
        listing = _tool("nvdisasm", "-c", str(binary)).stdout
    kernels = []
    for name, figures in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL):
        number = lambda pattern, text=figures: int(_found(pattern, text) or 0)
        declared = re.search(rf"\.entry {re.escape(name)}\b.*?\.(?:max|req)ntid ([\d, ]+)", ptx, re.DOTALL)
        kernels.append(
            Kernel(
                name,
                compiler,
                registers=number(r"Used (\d+) registers"),
                spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                shared_memory=number(r"(\d+) bytes smem"),
                threads=math.prod(map(int, declared[1].split(","))) if declared else 1024,
                blocks=0,
                code=code(_found(rf"^\.text\.{re.escape(name)}:\n(.*?)(?=^//-----|\Z)", listing)),
            )
        )
    return kernels


def code(listing: str) -> Code:
    """The instructions of one function, of which the longest loop that holds no other is told apart."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    end = 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            guard, name, rest = found.groups()
            if name == "NOP":
                continue
            if name == "BRA" and (goal := re.search(r"\((\.L\w+)\)", rest)):
                jumps.append((len(names), goal[1]))
            names.append(name)
            if name == "EXIT" and not guard:
                end = len(names)
    # What comes after the last way out is where waits go round, and padding.
    loops = [(labels[goal], at + 1) for at, goal in jumps if labels[goal] <= at < end]
    innermost = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    start, stop = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return Code(Counter(names[start:stop]), Counter(names[:start] + names[stop:end]))


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_folder() / name, *arguments], check=True, capture_output=True, encoding="utf-8", errors="replace"
    )


@functools.cache
def _folder() -> Path:
    triton = importlib.util.find_spec("triton")
    if not triton or not triton.submodule_search_locations:
        raise aot.NotInstalled(aot.MISSING)
    return Path(triton.submodule_search_locations[0], "backends/nvidia/bin")
