"""Decode attention on Hopper's tensor cores, every tier of a cascade in one launch (Pallas, Mosaic GPU).

A block takes one KV head of one row and a run of slots, tile by tile, as flash-decoding does (Dao et al. 2023). The slots are the rows
of the matrix instructions and the query heads of the KV head their columns, so a group of eight costs what a group of one does. Codes of
every format are exact in bf16, the instructions' type; a query and a probability are sums of bf16 numbers, so nothing but the order of the
additions tells the result from float32. Scales and low ends are per slot and stay outside of the products:
logit = scale · (q · code) + low · Σq, and likewise for the values.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvcascade.kernels.backend import capability
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import NEVER, TERMS, Partial, terms
from kvcascade.kernels.slots import Slots, format_of, payload

TILE = 64  # slots at once: the rows of a matrix instruction
HEADS = 8  # query heads of a KV head: the fewest columns of a matrix instruction
COLUMNS = 16  # the narrowest tile of probabilities that an instruction reads from shared memory; its second half is never looked at
STAGES = 3  # tiles on their way at once
FULL = 264  # blocks that fill the card: two for each of an H100's multiprocessors
SHARE = 16  # how many times the bytes of its own query and results a split reads, where there are so many slots

ACC = plgpu.ACC  # pyright: ignore
GRID = plgpu.Layout.WGMMA
SLOT, HEAD = GRID.reduce(1), GRID.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tier:
    """What the kernel is told of a tier when it is traced."""

    slots: int
    per_split: int
    """Tiles of a split."""
    first: int
    """The first of its splits among those of all tiers."""
    dtype: Any
    """Of the codes, or of the values where they are stored as they are."""
    width: int
    """Stored numbers per vector: H, or H/2 where a byte holds two."""

    @property
    def ahead(self) -> int:
        """Slots of the row before that the first tile may begin with, since copies begin at every eighth slot of all rows together."""
        return 8 if self.slots % 8 else 0

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.slots + max(self.ahead - 1, 0), TILE)

    @property
    def splits(self) -> int:
        return pl.cdiv(self.tiles, self.per_split)

    @property
    def direct(self) -> bool:
        """Whether the slots are copied to where matrix instructions read them; others go through registers."""
        return self.dtype == jnp.bfloat16 and self.width % 64 == 0

    @property
    def swizzle(self) -> int:
        """How many bytes of a vector lie together in shared memory."""
        return next(each for each in (128, 64, 32) if 2 * self.width % each == 0)


def refuses(q_BNH: Float[Array, "B N H"], slots: Sequence[Slots], heads: Heads) -> str | None:
    """Why the kernel cannot take these tiers, or None."""
    H, group = q_BNH.shape[-1], q_BNH.shape[1] // slots[0].pos_BKS.shape[1]
    gpu = capability()
    if gpu and gpu[0] != 9:
        return f"made for compute capability 9.0, not {gpu[0]}.{gpu[1]}"
    if group > HEADS or H > 128:
        return f"made for {HEADS} query heads to a KV head and heads 128 wide at most, not {group} and {H}"
    if heads.soft_cap:
        return "made for logits without a soft cap"
    for tier in slots:
        stored = payload(tier.k)
        if (payload(tier.v).dtype, *tier.k) != (stored.dtype, *tier.v):
            return "made for keys and values in one codec"
        if format_of(tier.k) not in ("bf16", "fp8", "int8", "int4"):
            return "made for slots in bf16, fp8, int8 and int4"
        if tier.pos_BKS.size % 8:
            return f"made for tiers whose slots in all rows are a multiple of 8, not {tier.pos_BKS.size}"
        if stored.shape[-1] % 16:
            return f"made for {stored.dtype} vectors whose stored width is a multiple of 16, not {stored.shape[-1]}"
    return None


# Compiled by itself, so that layers of one shape share one kernel: making it takes seconds.
@functools.partial(jax.jit, static_argnames=("heads", "observed", "interpret"))
def attend(
    turned: Sequence[Float[Array, "B N H"]],
    q_pos_B: Int[Array, " B"],
    slots: Sequence[Slots],
    heads: Heads,
    observed: bool,
    interpret: bool,
) -> tuple[list[Partial], list[Float[Array, "B K G _"]]]:
    """`partial.attend` for one query per row and each of the tiers, whose formats it was `turned` for, and so is the output.

    A partial's arrays have a leading axis of as many as the slots were split into. With `observed` also each tier's logits.
    """
    (B, N, H), K = turned[0].shape, slots[0].pos_BKS.shape[1]
    tiers, operands, first = [], [], 0
    for tier, q_BNH in zip(slots, turned, strict=True):
        stored = payload(tier.k)
        each = Tier(tier.pos_BKS.shape[-1], 1, first, stored.dtype, stored.shape[-1])
        per_slot = 4 + sum(x.shape[-1] * x.dtype.itemsize for x in jax.tree.leaves((tier.k, tier.v)))
        least = pl.cdiv(SHARE * HEADS * H * (2 * TERMS + 4), TILE * per_slot)
        per_split = max(min(least, each.tiles), each.tiles // pl.cdiv(FULL, B * K))
        tiers.append(dataclasses.replace(each, per_split=per_split))
        operands.append(_operands(q_BNH.astype(jnp.float32) * heads.scale, tier))
        first += tiers[-1].splits
    like = lambda *shape: jax.ShapeDtypeStruct((B * K, *shape), jnp.float32)
    leaves, tree = jax.tree.flatten(operands)
    kernel = plgpu.kernel(
        functools.partial(_body, tiers, tree, heads, N // K, K),
        out_type=[
            like(first, pl.cdiv(H, 64) * 64, HEADS),
            like(first, 3, COLUMNS),
            *(like(N // K, tier.ahead + tier.tiles * TILE) for tier in tiers if observed),
        ],
        grid=(B * K, first),
        grid_names=("row", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="kvcascade_decode",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    out, stats, *logits = kernel(q_pos_B, *leaves)
    parts = [_partial(tier, (B, N, H), out, stats) for tier in tiers]
    own = lambda tier: slice(tier.ahead, tier.ahead + tier.slots)
    logits = [x.reshape(B, K, N // K, -1)[..., own(tier)] for x, tier in zip(logits, tiers, strict=False)]
    return parts, logits


def _operands(q_BNH, tier):
    """The arrays of one tier in the shapes that the kernel reads."""
    B, K, _ = tier.pos_BKS.shape
    N, H = q_BNH.shape[1:]
    q = jnp.pad(q_BNH.reshape(B * K, N // K, H), ((0, 0), (0, HEADS - N // K), (0, 0)))
    sums = jnp.pad(q.sum(-1), ((0, 0), (0, COLUMNS - HEADS)))
    # The second of a byte's two codes is read as sixteen times what it is.
    q = jnp.stack([q[..., : H // 2], q[..., H // 2 :] / 16], 1) if payload(tier.k).shape[-1] < H else q[:, None]
    q = jnp.stack(terms(q), 2)
    stored = lambda x: (
        {"codes": payload(x).reshape(-1, payload(x).shape[-1])}
        | {n: x[n].reshape(-1) for n in ("scale", "low") if n in x}
    )
    return {
        "q": q.reshape(B * K, -1, q.shape[-1]),
        "sums": sums,
        "pos": tier.pos_BKS.reshape(-1),
        "k": stored(tier.k),
        "v": stored(tier.v),
    }


def _tiled(shape, dtype, swizzle):
    """Shared memory in the order in which matrix instructions read it."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # pyright: ignore
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # pyright: ignore


def _body(tiers, tree, heads, group, K, now_ref, *refs):
    operands = tree.unflatten(refs[: tree.num_leaves])
    out_ref, stats_ref, *logits_refs = refs[tree.num_leaves :]
    split, now = lax.axis_index("split"), now_ref[lax.axis_index("row") // K]
    for index, (tier, arrays) in enumerate(zip(tiers, operands, strict=True)):
        of_tier = (split >= tier.first) & (split < tier.first + tier.splits)
        logits_ref = logits_refs[index] if logits_refs else None
        attend = functools.partial(_attend, tier, arrays, heads, group, now, out_ref, stats_ref, logits_ref)
        pl.when(of_tier)(functools.partial(pl.run_scoped, attend, **_scratch(tier, arrays, heads.width)))


def _scratch(tier, arrays, H):
    """The shared memory of a block: stages of what is on its way, and the operands of the matrix instructions."""
    padded, parts = pl.cdiv(H, 64) * 64, H // tier.width
    per_slot = lambda dtype: plgpu.SMEM((STAGES, TILE), dtype)

    def stages(vectors, swizzle):
        codes = (STAGES, TILE, tier.width)
        scales = {name: per_slot(vectors[name].dtype) for name in vectors if name != "codes"}
        return {"codes": _tiled(codes, tier.dtype, swizzle) if tier.direct else plgpu.SMEM(codes, tier.dtype), **scales}

    def barrier(copies):
        return plgpu.Barrier(num_barriers=STAGES, num_arrivals=copies)

    return {
        "q": _tiled((parts * TERMS * COLUMNS, tier.width), jnp.bfloat16, tier.swizzle),
        "q_there": plgpu.Barrier(num_arrivals=parts * TERMS),
        "k": stages(arrays["k"], tier.swizzle) | {"pos": per_slot(jnp.int32)},
        "k_there": barrier(len(arrays["k"]) + 1),
        "v": stages(arrays["v"], 32),
        "v_there": barrier(len(arrays["v"])),
        "p": _tiled((TILE, TERMS * COLUMNS), jnp.bfloat16, 32),
        "k16": [] if tier.direct else [_tiled((TILE, tier.width), jnp.bfloat16, tier.swizzle) for _ in range(parts)],
        "v16": [] if tier.direct else [_tiled((TILE, padded), jnp.bfloat16, 32)],
    }


def _attend(tier, arrays, heads, group, now, out_ref, stats_ref, logits_ref, **sm):
    """One split of one tier: the softmax goes on from tile to tile, the columns of every array being query heads."""
    row, split = lax.axis_index("row"), lax.axis_index("split")
    first = (split - tier.first) * tier.per_split
    tiles = jnp.minimum(tier.per_split, tier.tiles - first)
    ahead = row * tier.slots % 8
    parts = heads.width // tier.width

    def fetch(tile, stage):
        # What lies before a row's first slot and after its last one is another row's, or nothing, and never looked at.
        here = pl.ds(pl.multiple_of(row * tier.slots - ahead + (first + tile) * TILE, 8), TILE)
        for name, there in (("k", "k_there"), ("v", "v_there")):
            to, barrier = sm[name], sm[there].at[stage]
            for each in to:
                source = arrays["pos"] if each == "pos" else arrays[name][each]
                plgpu.copy_gmem_to_smem(source.at[here], to[each].at[stage], barrier)

    for term in range(parts * TERMS):
        source, to = arrays["q"].at[row, pl.ds(term * HEADS, HEADS)], sm["q"].at[pl.ds(term * COLUMNS, HEADS)]
        plgpu.copy_gmem_to_smem(source, to, sm["q_there"])
    for stage in range(STAGES):
        pl.when(stage < tiles)(functools.partial(fetch, stage, stage))
    sums = plgpu.load(arrays["sums"].at[row], layout=HEAD, optimized=False)
    plgpu.barrier_wait(sm["q_there"])

    per_slot = lambda ref, stage: plgpu.load(ref.at[stage], layout=SLOT)
    across = lambda x_S: lax.broadcast_in_dim(x_S, (TILE, COLUMNS), [0])
    down = lambda x_N, rows=TILE: lax.broadcast_in_dim(x_N, (rows, COLUMNS), [1])

    together = lambda x: sum(x[:, term * COLUMNS : (term + 1) * COLUMNS] for term in range(TERMS))

    def unpack(codes, refs):
        """Codes as bf16 where matrix instructions find them, in portions between fences for want of registers."""
        wide = 64 if tier.width == 128 else tier.width
        for start in range(0, tier.width, wide):
            columns = pl.ds(start, wide)
            some = codes[:, columns]
            if tier.dtype == jnp.float8_e4m3fn:
                some = some.astype(jnp.float32)  # the card converts to bf16 from there only
            for part, ref in enumerate(refs):
                ref[:, columns] = (some if parts == 1 else some & jnp.uint8((15, 240)[part])).astype(jnp.bfloat16)
                plgpu.commit_smem()

    def step(tile, carry):
        acc, top, total, lows = carry
        stage = lax.rem(tile, STAGES)
        start = (first + tile) * TILE - ahead
        plgpu.barrier_wait(sm["k_there"].at[stage])
        if not tier.direct:
            unpack(sm["k"]["codes"].at[stage], sm["k16"])

        def products(acc_ref):
            for part in range(parts):
                keys = sm["k"]["codes"].at[stage] if tier.direct else sm["k16"][part]
                q = sm["q"].at[pl.ds(part * TERMS * COLUMNS, TERMS * COLUMNS)]
                plgpu.wgmma(acc_ref, keys, q.transpose((1, 0)))
            return acc_ref[...]

        logits = together(pl.run_scoped(products, ACC((TILE, TERMS * COLUMNS), jnp.float32)))
        if "scale" in sm["k"]:
            logits = logits * across(per_slot(sm["k"]["scale"], stage).astype(jnp.float32))
        if "low" in sm["k"]:
            logits = logits + across(per_slot(sm["k"]["low"], stage).astype(jnp.float32)) * down(sums)
        pos = per_slot(sm["k"]["pos"], stage)
        slot = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=SLOT) + start
        seen = (slot >= 0) & (slot < tier.slots) & (pos >= 0) & heads.sees(now - pos)
        logits = jnp.where(across(seen), logits, NEVER)
        if logits_ref is not None:
            column = plgpu.broadcasted_iota(jnp.int32, (TILE, COLUMNS), 1, layout=GRID)
            for g in range(group):
                own = jnp.where(column == g, logits, -jnp.inf).max(axis=1)
                plgpu.store(logits_ref.at[row, g, pl.ds(tier.ahead + start, TILE)], own, optimized=False)

        new_top = jnp.maximum(top, logits.max(axis=0))
        faded = jnp.exp(top - new_top)
        weights = jnp.exp(logits - down(new_top))
        total = total * down(faded) + weights
        plgpu.barrier_wait(sm["v_there"].at[stage])
        if "low" in sm["v"]:
            lows = lows * down(faded) + weights * across(per_slot(sm["v"]["low"], stage).astype(jnp.float32))
        if "scale" in sm["v"]:
            weights = weights * across(per_slot(sm["v"]["scale"], stage).astype(jnp.float32))
        if not tier.direct:
            halves = [sm["v16"][0].at[:, pl.ds(part * tier.width, tier.width)] for part in range(parts)]
            unpack(sm["v"]["codes"].at[stage], halves)
        for term in range(TERMS):
            high = weights.astype(jnp.bfloat16)
            sm["p"][:, pl.ds(term * COLUMNS, COLUMNS)] = high
            weights = weights - high.astype(jnp.float32)
        # For the products, which read what was written; and for the next copies, which overwrite what was read.
        plgpu.commit_smem()

        def weighted(acc_ref):
            values = sm["v"]["codes"].at[stage] if tier.direct else sm["v16"][0]
            plgpu.wgmma(acc_ref, values.transpose((1, 0)), sm["p"])
            return acc_ref[...]

        more = pl.run_scoped(weighted, ACC((acc.shape[0], TERMS * COLUMNS), jnp.float32))
        acc = acc * down(faded, acc.shape[0]) + together(more)
        pl.when(tile + STAGES < tiles)(functools.partial(fetch, tile + STAGES, stage))
        return acc, new_top, total, lows

    full = lambda shape, value, layout: plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    zeros = full((TILE, COLUMNS), 0.0, GRID)
    # Far above NEVER, so that the weight of a slot that is not seen is zero even where nothing has been seen.
    top = full((COLUMNS,), NEVER / 10, HEAD)
    carry = full((out_ref.shape[2], COLUMNS), 0.0, GRID), top, zeros, zeros
    acc, top, total, lows = lax.fori_loop(0, tiles, step, carry)
    plgpu.store(out_ref.at[row, split], acc[:, :HEADS], optimized=False)
    for index, each in enumerate((top, total.sum(axis=0), lows.sum(axis=0))):
        plgpu.store(stats_ref.at[row, split, index], each, optimized=False)


def _partial(tier, shape, out, stats):
    """What the kernel wrote of a tier, [rows, splits, channels, heads], as a partial [splits, B, 1, N, …]."""
    B, N, H = shape
    group = B * N // out.shape[0]
    splits = slice(tier.first, tier.first + tier.splits)
    heads = lambda x_RPG: x_RPG[..., :group].swapaxes(0, 1).reshape(tier.splits, B, 1, N)
    top, total, lows = (heads(stats[:, splits, index]) for index in range(3))
    out = out[:, splits, :H, :group].transpose(1, 0, 3, 2).reshape(tier.splits, B, 1, N, H)
    if tier.width < H:
        out = out * jnp.where(jnp.arange(H) < tier.width, 1, 1 / 16)
    return Partial(out + lows[..., None], top, total)
