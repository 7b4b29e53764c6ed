"""Decode attention on a GPU's tensor cores (Triton): one pass over the slots as they are stored, in a row or in pages.

Codes are exact in bf16, so they are multiplied as they are, and a vector's scale and low end outside of the products:
q·k = scale · (q·codes) + low · Σq. The float32 side is the sum of three bf16 terms, whose products with codes are exact.
"""

from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from kvcascade.kernels.heads import Heads
from kvcascade.kernels.launch import launch
from kvcascade.kernels.levels import normal_levels
from kvcascade.kernels.partial import Partial
from kvcascade.kernels.slots import Pair, Slots, Stored, format_of, payload, unknown

TILE = 64  # slots at once
BLOCKS = 2 * 132  # what fills an H100


class Blocks(NamedTuple):
    """Where rows' slots stand that are in the blocks of a pool."""

    table_BW: Int[Array, "B W"]
    """Each row's blocks, -1: none."""
    layer: int
    limit: int
    """How many slots a row has at most."""


def refuses(slots: Pair) -> str | None:
    """Why the kernel cannot read these, or None."""
    for stored in (slots.k, slots.v):
        kind = format_of(stored)
        if kind is None:
            return unknown(stored)
        if _head_dim(stored, kind) % 2:
            return "the head width is odd"
        if "fine" in stored and _head_dim(stored, kind) % 16:
            return f"made for planes of heads whose width is a multiple of 16, not of {_head_dim(stored, kind)}"
    return None


def _head_dim(stored: Stored, kind: str) -> int:
    each = 4 if "codes2" in stored else 2 if kind in ("int4", "nvfp4", "planes", "lloyd4") else 1
    return payload(stored).shape[-1] * each


def attend(
    q_BNH: Float[Array, "B N H"],
    q_pos_B: Int[Array, " B"],
    slots: Slots | Pair,
    heads: Heads,
    observed: bool,
    interpret: bool,
    blocks: Blocks | None = None,
) -> tuple[Partial, Float[Array, "B K G S"] | None]:
    """`partial.attend` for one query per row, in parts: the partial's arrays have a leading axis of as many as the slots were split into.

    The query is `turn`ed if the format is, and so is the output. With `observed` also the logits, -inf where a slot is not seen.
    In blocks the arrays are those of a pool [P, L, K, Z, …], and a slot's number is its position.
    """
    B, N, H = q_BNH.shape
    K, Z = payload(slots.k).shape[-3:-1]
    S = Z if blocks is None else blocks.limit
    assert isinstance(slots, Slots) or blocks
    where = slots.pos_BKS if isinstance(slots, Slots) else blocks.table_BW  # pyright: ignore
    G = N // K
    tiles, split = _split(B * K, S, 2 * 4 * G * H, _bytes_per_slot(slots))
    results = [(split, B, N, H), (split, B, N), (split, B, N), (B, K, G, S) if observed else (1,)]
    out, top, total, logits = launch(
        _attend,
        (B * K, split),
        [q_BNH, q_pos_B, where, *_arrays(slots.k), *_arrays(slots.v)],
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        interpret=interpret,
        registers=255,
        K=K, G=G, S=S, Z=Z, H=H, ROWS=max(16, triton.next_power_of_2(G)), HALF=max(16, triton.next_power_of_2(H // 2)),
        FORM=format_of(slots.k), FORM_V=format_of(slots.v), LEVELS=_levels(slots.k), LEVELS_V=_levels(slots.v),
        BLOCK=min(16, H // 2), WIDTH=blocks.table_BW.shape[1] if blocks else 0,
        LAYERS=payload(slots.k).shape[1] if blocks else 1, LAYER=blocks.layer if blocks else 0, OBSERVED=observed,
        WINDOW=heads.window, SCALE=heads.scale, CAP=heads.soft_cap, TILE=TILE, TILES=tiles,
    )  # fmt: skip
    return Partial(out[:, :, None], top[:, :, None], total[:, :, None]), logits if observed else None


def _arrays(stored: Stored) -> list[Array]:
    """Codes, a scale per vector, what else the format has, and a plane of lower bits; what it has not is the codes again, which nobody reads."""
    codes = payload(stored)
    if codes.dtype == jnp.float8_e4m3fn:  # which Triton does not read on cards older than Ada
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    more = stored.get("low", stored.get("scales", codes))
    if more.dtype == jnp.float8_e4m3fn:
        more = jax.lax.bitcast_convert_type(more, jnp.uint8)
    return [codes, stored.get("scale", codes), more, stored.get("fine", codes)]


def _levels(stored: Stored) -> tuple[float, ...]:
    """What codes stand for, where it is not themselves."""
    kind = format_of(stored) or ""
    return normal_levels(int(kind[-1])) if kind.startswith("lloyd") else ()


def _bytes_per_slot(slots: Pair) -> int:
    return 4 + sum(x.shape[-1] * x.dtype.itemsize for stored in (slots.k, slots.v) for x in stored.values())


def _split(rows: int, S: int, own_bytes: int, bytes_per_slot: int) -> tuple[int, int]:
    """Tiles of a split, and how many splits: enough to fill a card, while a split reads 16 times the bytes of its query and output."""
    tiles = max(1, triton.cdiv(S, TILE))
    least = max(4, triton.cdiv(16 * own_bytes, bytes_per_slot * TILE))
    splits = max(1, min(triton.cdiv(BLOCKS, rows), tiles // least))
    each = triton.cdiv(tiles, splits)
    return each, triton.cdiv(tiles, each)


@triton.jit
@no_type_check
def _attend(
    q, q_pos, where, k, k_scale, k_more, k_fine, v, v_scale, v_more, v_fine, out, top, total, logits,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, Z: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    FORM: tl.constexpr, FORM_V: tl.constexpr, LEVELS: tl.constexpr, LEVELS_V: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, LAYERS: tl.constexpr, LAYER: tl.constexpr, OBSERVED: tl.constexpr,
    WINDOW: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch, head = row // K, row % K
    now = tl.load(q_pos + batch)
    g, j = tl.arange(0, ROWS), tl.arange(0, HALF)
    query = (row * G + g[:, None]) * H + j[None, :]
    real = (g < G)[:, None] & (j < H // 2)[None, :]
    first = tl.load(q + query, mask=real, other=0).to(tl.float32) * SCALE
    second = tl.load(q + query + H // 2, mask=real, other=0).to(tl.float32) * SCALE
    whole = tl.sum(first, 1) + tl.sum(second, 1)
    first1, first2, first3 = _terms(first)
    second1, second2, second3 = _terms(second)

    largest = tl.full((ROWS,), -1e30, tl.float32)  # partial.NEVER
    weight = tl.zeros((ROWS,), tl.float32)
    lows = tl.zeros((ROWS,), tl.float32)
    out1 = tl.zeros((ROWS, HALF), tl.float32)
    out2 = tl.zeros((ROWS, HALF), tl.float32)
    start = part * TILES * TILE
    for tile in range(start, tl.minimum(start + TILES * TILE, S), TILE):
        s = tile + tl.arange(0, TILE)
        there = s < S
        if WIDTH:
            block = tl.load(where + batch * WIDTH + s // Z, mask=there, other=-1)
            slot = ((block.to(tl.int64) * LAYERS + LAYER) * K + head) * Z + s % Z
            held = tl.where(there & (block >= 0), s, -1)
        else:
            slot = row * S + s
            held = tl.load(where + slot, mask=there, other=-1)
        seen = (held >= 0) & sees(now - held, WINDOW)
        k1, k2 = _read(k, k_more, k_fine, slot, seen, j, H, HALF, FORM, LEVELS, BLOCK, TILE)
        score = tl.zeros((ROWS, TILE), tl.float32)
        score = _product(first1, first2, first3, tl.trans(k1), score)
        score = _product(second1, second2, second3, tl.trans(k2), score)
        if FORM != "bf16":
            score = score * tl.load(k_scale + slot, mask=seen, other=0).to(tl.float32)[None, :]
        if FORM == "int4" or FORM == "int3" or FORM == "int2" or FORM == "planes":
            score += whole[:, None] * tl.load(k_more + slot, mask=seen, other=0).to(tl.float32)[None, :]
        score = tl.where(seen[None, :], capped(score, CAP), float("-inf"))
        if OBSERVED:
            tl.store(logits + (row * G + g[:, None]) * S + s[None, :], score, mask=(g < G)[:, None] & (s < S)[None, :])
        larger = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp(largest - larger)
        p = tl.exp(score - larger[:, None])
        largest = larger
        weight = weight * shrink + tl.sum(p, 1)
        if FORM_V == "int4" or FORM_V == "int3" or FORM_V == "int2" or FORM_V == "planes":
            lows = lows * shrink + tl.sum(p * tl.load(v_more + slot, mask=seen, other=0).to(tl.float32)[None, :], 1)
        if FORM_V != "bf16":
            p = p * tl.load(v_scale + slot, mask=seen, other=0).to(tl.float32)[None, :]
        p1, p2, p3 = _terms(p)
        v1, v2 = _read(v, v_more, v_fine, slot, seen, j, H, HALF, FORM_V, LEVELS_V, BLOCK, TILE)
        out1 = _product(p1, p2, p3, v1, out1 * shrink[:, None])
        out2 = _product(p1, p2, p3, v2, out2 * shrink[:, None])

    # Results are [splits, B, N, H] and [splits, B, N]; N is K times G.
    query += part * tl.num_programs(0) * G * H
    tl.store(out + query, out1 + lows[:, None], mask=real)
    tl.store(out + query + H // 2, out2 + lows[:, None], mask=real)
    one = (part * tl.num_programs(0) + row) * G + g
    tl.store(top + one, largest, mask=g < G)
    tl.store(total + one, weight, mask=g < G)


@triton.jit
@no_type_check
def sees(age, WINDOW: tl.constexpr):
    """`Heads.sees`."""
    seen = age >= 0
    if WINDOW:
        seen = seen & (age < WINDOW)
    return seen


@triton.jit
@no_type_check
def capped(logits, CAP: tl.constexpr):
    """`Heads.capped`."""
    if CAP > 0:  # a condition must not be a float
        # Of a large |x| the exponential is 0 or infinite, and the fraction 1 or 0.
        logits = CAP - 2 * CAP / (1 + tl.exp(2 * logits / CAP))
    return logits


@triton.jit
@no_type_check
def _terms(x):
    """Three bf16 numbers whose sum is x to 24 bits."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
@no_type_check
def _product(high, middle, low, tile, total):
    return tl.dot(high, tile, tl.dot(middle, tile, tl.dot(low, tile, total)))


@triton.jit
@no_type_check
def _read(
    codes, scales, fine, slot, seen, j,
    H: tl.constexpr, HALF: tl.constexpr, FORM: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The codes of channels j and j + H/2, or what they stand for, as numbers in bf16, which has them exactly."""
    mask = seen[:, None] & (j < H // 2)[None, :]
    if FORM == "int3" or FORM == "int2" or FORM == "lloyd3" or FORM == "lloyd2" or FORM == "lloyd4" or FORM == "planes":
        if FORM == "lloyd4" or FORM == "planes":
            pair = tl.load(codes + slot[:, None] * (H // 2) + j[None, :], mask=mask, other=0)
            first, second = pair & 15, pair >> 4
        else:
            # Of the four channels of a byte, H/4 apart, two are in each half.
            if HALF == H // 2:
                byte = tl.arange(0, HALF // 2)
                four = tl.load(codes + slot[:, None] * (H // 4) + byte[None, :], mask=seen[:, None], other=0)
                first, second = (
                    _pairs(four & 3, (four >> 2) & 3, TILE, HALF),
                    _pairs((four >> 4) & 3, four >> 6, TILE, HALF),
                )
            else:
                four = tl.load(codes + slot[:, None] * (H // 4) + (j % (H // 4))[None, :], mask=mask, other=0)
                shift = (2 * (j // (H // 4)))[None, :].to(tl.uint8)
                first, second = (four >> shift) & 3, (four >> (shift + 4)) & 3
        if FORM == "planes":
            more = tl.load(fine + slot[:, None] * (H // 2) + j[None, :], mask=mask, other=0)
            first, second = (first << 4) | (more & 15), (second << 4) | (more >> 4)
        elif FORM == "int3" or FORM == "lloyd3":
            first = (first << 1) | _bits(fine, slot * (H // 8), seen, H, HALF, TILE)
            second = (second << 1) | _bits(fine, slot * (H // 8) + H // 16, seen, H, HALF, TILE)
        return _standing(first, LEVELS).to(tl.bfloat16), _standing(second, LEVELS).to(tl.bfloat16)
    elif FORM == "int4" or FORM == "nvfp4":
        pair = tl.load(codes + slot[:, None] * (H // 2) + j[None, :], mask=mask, other=0)
        first, second = pair & 15, pair >> 4
        if FORM == "int4":
            return first.to(tl.float32).to(tl.bfloat16), second.to(tl.float32).to(tl.bfloat16)
        else:
            return (
                (e2m1(first) * _blocks(scales, slot * (H // BLOCK), seen, H, HALF, BLOCK, TILE)).to(tl.bfloat16),
                (e2m1(second) * _blocks(scales, slot * (H // BLOCK) + H // 2 // BLOCK, seen, H, HALF, BLOCK, TILE)).to(
                    tl.bfloat16
                ),
            )
    else:
        first = tl.load(codes + slot[:, None] * H + j[None, :], mask=mask, other=0)
        second = tl.load(codes + slot[:, None] * H + H // 2 + j[None, :], mask=mask, other=0)
        if FORM == "bf16":
            return first, second
        elif FORM == "fp8":
            return e4m3(first).to(tl.bfloat16), e4m3(second).to(tl.bfloat16)
        else:
            return first.to(tl.float32).to(tl.bfloat16), second.to(tl.float32).to(tl.bfloat16)


@triton.jit
@no_type_check
def _pairs(first, second, TILE: tl.constexpr, HALF: tl.constexpr):
    """The channels of one array, and then those of the other."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (TILE, HALF))


@triton.jit
@no_type_check
def _bits(fine, start, seen, H: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr):
    """One bit of each of HALF channels."""
    byte = tl.arange(0, HALF // 8)
    mask = seen[:, None] & (byte < H // 16)[None, :]
    held = tl.load(fine + start[:, None] + byte[None, :], mask=mask, other=0)
    bits = (held[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.reshape(bits, (TILE, HALF))


@triton.jit
@no_type_check
def _standing(code, LEVELS: tl.constexpr):
    """What codes stand for: one of the levels, or themselves where there are none."""
    found = code.to(tl.float32)
    for index in tl.static_range(len(LEVELS)):
        found = tl.where(code == index, LEVELS[index], found)
    return found


@triton.jit
@no_type_check
def _blocks(scales, start, seen, H: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The scale of each of HALF channels, of which BLOCK have the same one."""
    block = tl.arange(0, HALF // BLOCK)
    scale = tl.load(
        scales + start[:, None] + block[None, :], mask=seen[:, None] & (block < H // 2 // BLOCK)[None, :], other=0
    )
    return tl.reshape(tl.broadcast_to(e4m3(scale)[:, :, None], (TILE, HALF // BLOCK, BLOCK)), (TILE, HALF))


@triton.jit
@no_type_check
def e4m3(code):
    """An e4m3 number from its bits: those of a float16 with 8 too little in the exponent (float32 would do, but not where it is flushed to zero)."""
    bits = code.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256


@triton.jit
@no_type_check
def e2m1(code):
    """An e2m1 number from its bits, as in `e4m3` with 14."""
    bits = code.to(tl.uint16)
    return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384
