"""Measure what flash_attention.md says and fill it in: `make docs`, a few minutes; with `--fill` from the numbers recorded, a second.

Bytes are counted, not timed: those that the kernels of a program compiled for an H100 read and write, and those that interpreted kernels
load and store. So no GPU is needed, but the extra `[aot]` is.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flash_figures
import flash_tables
import jax
import jax.numpy as jnp
from flash_tables import GROUP, H
from jax import lax

from kvcascade.cache.codec import CODECS
from kvcascade.eval.kernels import cases, check
from kvcascade.eval.kernels.cases import nbytes
from kvcascade.eval.kernels.whole_step import Record
from kvcascade.eval.origin import origin
from kvcascade.eval.report import readme
from kvcascade.kernels import aot, traffic
from kvcascade.kernels.decode import decode
from kvcascade.kernels.files import write_whole
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import normalise
from kvcascade.kernels.slots import Codecs, Slots

FOLDER = Path(__file__).parent
PAGE, NUMBERS = FOLDER / "flash_attention.md", FOLDER / "flash_attention.json"
CARD = "h100"
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
COUNTED = 4096
"""Interpreting a kernel takes its time: no more tokens than these."""
SLOTS = (1024, 4096, 16384)
QUERIES = (64, 128)
"""Of a block."""


def naive(q_TH, k_SH, v_SH):
    """Attention as its formula has it, the products in bf16 with float32 sums, softmax in float32."""
    logits_TS = jnp.einsum("TH,SH->TS", q_TH, k_SH, preferred_element_type=jnp.float32) * H**-0.5
    return jax.nn.softmax(logits_TS).astype(v_SH.dtype) @ v_SH


def in_a_loop(q_TH, k_SH, v_SH):
    """The same for a block of queries after another, and again in the backward pass: no more than one block's weights exist at a time."""
    block = jax.checkpoint(lambda q: naive(q, k_SH, v_SH))
    return lax.map(block, q_TH.reshape(-1, QUERIES[-1], H)).reshape(q_TH.shape)


PROGRAMS: dict[str, Callable] = {"naive": naive, "loop": in_a_loop}


def measure() -> Record:
    """All numbers of the page."""
    start, card = time.monotonic(), aot.gpu(CARD)
    found = {"card": described(card), "forward": forward(card), "backward": backward(card), "decode": decoding(card)}
    return found | origin(time.monotonic() - start)


def described(card: aot.GPU) -> Record:
    """What the compiler knows of a card; bytes, per second."""
    rate = re.search(
        r"matrix_unit_description.*?key: 16\s+value \{\s+clock_rate_ghz: (\S+)\s+units_per_core: (\d+)\s+ops_per_clock: (\d+)",
        card.text,
        re.DOTALL,
    )  # 16 is bf16 among XLA's types
    assert rate
    clock, units, products = map(float, rate.groups())
    return {
        "name": card.full_name,
        "memory": card.memory,
        "bandwidth": card.bandwidth,
        "l2": int(card.number("l2_cache_size")),
        "shared_memory": int(card.number("shared_memory_per_core")),
        "registers": 4 * int(card.number("registers_per_core_limit")),
        "multiprocessors": card.multiprocessors,
        "clock": card.clock,
        "flops": card.multiprocessors * units * products * 2 * clock * 1e9,
        "instructions_per_byte": check.budget(card, 1),
    }


def _vectors(tokens: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((tokens, H), jnp.bfloat16)


def _compiled(function: Callable, arguments: tuple, card: aot.GPU) -> Record:
    compiled = aot.compile_for(function, arguments, card)
    launches = traffic.launches(compiled.as_text() or "")
    sizes = compiled.memory_analysis()
    assert sizes
    return {
        "moved": sum(launch.moved for launch in launches),
        "kernel": sum(launch.moved for launch in launches if "triton" in launch.target),
        "launches": len(launches),
        "temporaries": sizes.temp_size_in_bytes,
    }


def forward(card: aot.GPU) -> list[Record]:
    """Attention among N tokens, one head: bytes moved by the two programs, and by the flash kernel."""
    import flash_kernel

    found = []
    for tokens in TOKENS:
        three = (_vectors(tokens),) * 3
        for name, program in PROGRAMS.items():
            found.append({"program": name, "tokens": tokens} | _compiled(program, three, card))
        for queries in QUERIES if tokens <= COUNTED else ():
            q, k, v = (jax.random.normal(jax.random.key(i), (tokens, H), jnp.bfloat16) for i in range(3))
            with traffic.counting() as counted:
                jax.block_until_ready(flash_kernel.attention(q, k, v, queries, interpret=True))
            moved = counted.read.total() + counted.written.total()
            found.append({"program": f"flash{queries}", "tokens": tokens, "moved": moved, "launches": 1})
    return found


def backward(card: aot.GPU) -> list[Record]:
    """Forward and backward pass of the two programs."""
    found = []
    for tokens in TOKENS:
        for name, program in PROGRAMS.items():

            def pull(q, k, v, dout, program=program):
                out, back = jax.vjp(program, q, k, v)
                return out, *back(dout)

            found.append({"program": name, "tokens": tokens} | _compiled(pull, (_vectors(tokens),) * 4, card))
    return found


def decoding(card: aot.GPU) -> list[Record]:
    """Attention from one token's queries over the slots of one KV head: bytes moved by our kernel, and by XLA's."""
    found = []
    for codec in cases.CODEC_NAMES:
        for slots in SLOTS:
            arguments = _step(codec, slots)
            shapes = jax.eval_shape(lambda arguments=arguments: arguments)
            ours, by_xla = (_decode(codec, name) for name in ("triton", "xla"))
            one = {"codec": codec, "slots": slots, "per_slot": 2 * CODECS[codec].nbytes(H) + 4}
            one["floor"] = nbytes(arguments) + nbytes(jax.eval_shape(by_xla, *shapes))
            with traffic.counting() as counted:
                jax.block_until_ready(jax.jit(ours)(*arguments))
            compiled = _compiled(ours, shapes, card)
            one["own"] = counted.read.total() + counted.written.total()
            one["moved"] = one["own"] + compiled["moved"] - compiled["kernel"]
            one["launches"] = compiled["launches"]
            one["xla"] = _compiled(by_xla, shapes, card)
            found.append(one)
    return found


def _step(codec: str, slots: int) -> tuple[Any, ...]:
    """Queries, their position, and full slots of random vectors, of one row and one KV head."""
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (CODECS[codec].encode(jax.random.normal(key, (1, 1, slots, H))) for key in keys[:2])
    held = Slots(k, v, jnp.arange(slots, dtype=jnp.int32)[None, None])
    return jax.random.normal(keys[2], (1, GROUP, H)), jnp.full(1, slots, jnp.int32), held


def _decode(codec: str, implementation) -> Callable:
    codecs, heads = Codecs(CODECS[codec], CODECS[codec]), Heads(GROUP, 1, H)

    def call(q, now, slots):
        return normalise([decode(q, now, [(slots, codecs)], heads, False, implementation=implementation)])[0][:, 0]

    return call


def generated(found: Record) -> dict[Path, str]:
    """The page, with its tables, and its figures."""
    parts = flash_tables.tables(found)
    drawn = {FOLDER / f"{name}.svg": svg for name, svg in flash_figures.drawn(found).items()}
    return {PAGE: readme.fill(PAGE.read_text("utf-8"), parts), **drawn}


def main() -> None:
    """Measure, unless `--fill` is given, and write the page."""
    if sys.argv[1:] != ["--fill"]:
        if not aot.ENVIRONMENT.items() <= os.environ.items():  # JAX has to find it when it starts
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | aot.ENVIRONMENT)
        write_whole(NUMBERS, (json.dumps(measure(), indent=1) + "\n").encode())
    for path, content in generated(json.loads(NUMBERS.read_text("utf-8"))).items():
        write_whole(path, content.encode())


if __name__ == "__main__":
    main()
