"""Exchange of one slot for a newcomer on a GPU (Triton), in place: of the slots it reads one, and of that one's vectors it writes all or none."""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from kvcascade.kernels.decode_triton import e2m1, e4m3
from kvcascade.kernels.launch import launch
from kvcascade.kernels.slots import Codecs, Entry, Slots, Stored, format_of, unknown

NUMBERS = 4  # that a token may carry


def refuses(slots: Slots, entry: Entry) -> str | None:
    """Why the kernel cannot exchange these, or None."""
    if entry.pos_BKT.shape[-1] != 1:
        return "made for one newcomer per KV head"
    if len(entry.numbers) > NUMBERS:
        return f"made for at most {NUMBERS} numbers per token, not {len(entry.numbers)}"
    for stored in (slots.k, slots.v):
        if _format(stored) is None:
            return unknown(stored)
    return "the head width is odd" if entry.k.shape[-1] % 2 or entry.v.shape[-1] % 2 else None


def _format(stored: Stored) -> str | None:
    if "values" in stored and stored["values"].dtype == jnp.float32:
        return "f32"
    found = format_of(stored)
    return found if found in ("bf16", "fp8", "int8", "int4", "nvfp4") else None


def exchange(
    slots: Slots, entry: Entry, priority_BKS: Float[Array, "B K _"], codecs: Codecs, forget: bool, interpret: bool
) -> tuple[Slots, Entry | None]:
    """`write.exchange` for one newcomer per KV head; codes are those of the reference bit for bit, apart from those of turned vectors."""
    B, K, S = slots.pos_BKS.shape
    H, W, count = entry.k.shape[-1], entry.v.shape[-1], len(entry.numbers)
    absent = (
        priority_BKS  # stands for what a format or a tier does not have, and is neither read nor written in its place
    )
    held = [
        ([slots.pos_BKS], 1),
        *(([_bits(stored[name]) for name in NAMES if name in stored], 3) for stored in (slots.k, slots.v)),
        (list(slots.numbers), NUMBERS),
    ]
    arrays = [priority_BKS, entry.k, entry.v, entry.pos_BKT, *entry.numbers, *[absent] * (NUMBERS - count)]
    in_place = []
    for some, places in held:
        in_place += range(len(arrays), len(arrays) + len(some))
        arrays += [*some, *[absent] * (places - len(some))]
    kept = lambda shape, there=True: jax.ShapeDtypeStruct(shape if there and not forget else (1,), jnp.float32)
    left = [kept((B, K, 1, H)), kept((B, K, 1, W)), jax.ShapeDtypeStruct((1,) if forget else (B, K, 1), jnp.int32)]
    turned = codecs.k.turned or codecs.v.turned
    results = iter(
        launch(
            _exchange,
            (B * K,),
            arrays,
            left + [kept((B, K, 1), i < count) for i in range(NUMBERS)],
            interpret=interpret,
            in_place=in_place,
            warps=max(4, max(H, W) // 16) if turned else 4,  # whose registers hold the matrix that turns
            S=S, COUNT=count, FORGET=forget, TILE=min(1024, triton.next_power_of_2(S)),
            H=H, HALF=triton.next_power_of_2(H // 2), FORM=_format(slots.k), TURNED=codecs.k.turned,
            W=W, HALF_V=triton.next_power_of_2(W // 2), FORM_V=_format(slots.v), TURNED_V=codecs.v.turned,
        )
    )  # fmt: skip
    pos_BKS = next(results)
    as_before = lambda stored: {
        name: jax.lax.bitcast_convert_type(next(results), stored[name].dtype) for name in NAMES if name in stored
    }
    slots = Slots(as_before(slots.k), as_before(slots.v), pos_BKS, tuple(next(results) for _ in slots.numbers))
    if forget:
        return slots, None
    return slots, Entry(next(results), next(results), next(results), tuple(results)[:count])


NAMES = ("values", "codes", "scale", "low", "scales")


def _bits(x: Array) -> Array:
    """Triton does not read float8 on cards older than Ada."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x


@triton.jit
@no_type_check
def _exchange(
    priority, k_new, v_new, pos_new, n1_new, n2_new, n3_new, n4_new,
    pos, k, k_scale, k_more, v, v_scale, v_more, n1, n2, n3, n4,
    k_left, v_left, pos_left, n1_left, n2_left, n3_left, n4_left,
    S: tl.constexpr, COUNT: tl.constexpr, FORGET: tl.constexpr, TILE: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr, FORM: tl.constexpr, TURNED: tl.constexpr,
    W: tl.constexpr, HALF_V: tl.constexpr, FORM_V: tl.constexpr, TURNED_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    lowest = tl.full((TILE,), float("inf"), tl.float32)
    oldest = tl.full((TILE,), 2147483647, tl.int32)
    where = lane
    for start in range(0, S, TILE):
        s = start + lane
        here = tl.load(priority + row * (S + 1) + s, mask=s < S, other=float("inf"))
        position = tl.load(pos + row * S + s, mask=s < S, other=2147483647)
        before = (here < lowest) | ((here == lowest) & (position < oldest))
        where = tl.where(before, s, where)
        oldest = tl.where(before, position, oldest)
        lowest = tl.where(before, here, lowest)
    least = tl.min(lowest, 0)
    oldest = tl.where(lowest == least, oldest, 2147483647)
    first = tl.min(oldest, 0)
    slot = row * S + tl.min(tl.where((lowest == least) & (oldest == first), where, S), 0)
    mine = tl.load(priority + row * (S + 1) + S)
    position = tl.load(pos_new + row)
    swap = (mine > least) | ((mine == least) & (position > first) & (mine > float("-inf")))
    if not FORGET:
        tl.store(pos_left + row, tl.where(swap, first, position))
    tl.debug_barrier()  # all threads load the positions, one stores the one that comes
    tl.store(pos + slot, position, mask=swap)
    if COUNT > 0:
        _number(n1_new, n1_left, n1, row, slot, swap, FORGET)
    if COUNT > 1:
        _number(n2_new, n2_left, n2, row, slot, swap, FORGET)
    if COUNT > 2:
        _number(n3_new, n3_left, n3, row, slot, swap, FORGET)
    if COUNT > 3:
        _number(n4_new, n4_left, n4, row, slot, swap, FORGET)
    _vector(k_new, k_left, k, k_scale, k_more, row, slot, swap, H, HALF, FORM, TURNED, FORGET)
    _vector(v_new, v_left, v, v_scale, v_more, row, slot, swap, W, HALF_V, FORM_V, TURNED_V, FORGET)


@triton.jit
@no_type_check
def _number(new, left, held, row, slot, swap, FORGET: tl.constexpr):
    coming = tl.load(new + row)
    if not FORGET:
        tl.store(left + row, tl.where(swap, tl.load(held + slot, mask=swap, other=0), coming))
        tl.debug_barrier()  # all threads load the number that leaves, one stores the one that comes
    tl.store(held + slot, coming, mask=swap)


@triton.jit
@no_type_check
def _vector(
    new, left, codes, scale, more, row, slot, swap,
    H: tl.constexpr, HALF: tl.constexpr, FORM: tl.constexpr, TURNED: tl.constexpr, FORGET: tl.constexpr,
):  # fmt: skip
    """Channels j and j + H/2 are two vectors, since 4-bit codes lie in pairs of them."""
    j = tl.arange(0, HALF)
    real = j < H // 2
    first = tl.load(new + row * H + j, mask=real, other=0).to(tl.float32)
    second = tl.load(new + row * H + H // 2 + j, mask=real, other=0).to(tl.float32)
    if not FORGET:
        victim1, victim2 = _read(codes, scale, more, slot, j, real & swap, swap, H, HALF, FORM)
        if TURNED:
            victim1, victim2 = _turn(victim1, victim2, HALF)
        tl.store(left + row * H + j, tl.where(swap, victim1, first), mask=real)
        tl.store(left + row * H + H // 2 + j, tl.where(swap, victim2, second), mask=real)
    if TURNED:
        first, second = _turn(first, second, HALF)
    tl.debug_barrier()  # as in `_number`
    _write(codes, scale, more, slot, j, first, second, real, swap, H, HALF, FORM)


@triton.jit
@no_type_check
def _turn(first, second, HALF: tl.constexpr):
    """Times the Walsh-Hadamard matrix of twice the order, whose element (i, j) is -1 where i and j share an odd number of bits, else 1."""
    i, j = tl.arange(0, HALF), tl.arange(0, HALF)
    bits = i[:, None] & j[None, :]
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    odd = (bits & 1) == 1
    plus, minus = (first + second)[:, None], (first - second)[:, None]
    shrink: tl.constexpr = (2 * HALF) ** -0.5
    return tl.sum(tl.where(odd, -plus, plus), 0) * shrink, tl.sum(tl.where(odd, -minus, minus), 0) * shrink


@triton.jit
@no_type_check
def _read(codes, scale, more, slot, j, mask, swap, H: tl.constexpr, HALF: tl.constexpr, FORM: tl.constexpr):
    """Both halves of the vector in a slot, in the basis that it is stored in."""
    if FORM == "int4" or FORM == "nvfp4":
        pair = tl.load(codes + slot * (H // 2) + j, mask=mask, other=0)
        first, second = pair & 15, pair >> 4
    else:
        first = tl.load(codes + slot * H + j, mask=mask, other=0)
        second = tl.load(codes + slot * H + H // 2 + j, mask=mask, other=0)
    if FORM == "bf16" or FORM == "f32":
        return first.to(tl.float32), second.to(tl.float32)
    step = tl.load(scale + slot, mask=swap, other=0).to(tl.float32)
    if FORM == "int8":
        return first.to(tl.float32) * step, second.to(tl.float32) * step
    elif FORM == "fp8":
        return e4m3(first) * step, e4m3(second) * step
    elif FORM == "int4":
        low = tl.load(more + slot, mask=swap, other=0).to(tl.float32)
        return first.to(tl.float32) * step + low, second.to(tl.float32) * step + low
    else:
        blocks: tl.constexpr = 1 if H <= 32 else H // 32
        scales = more + slot * (2 * blocks)
        return (
            e2m1(first) * _block_scales(scales, swap, blocks, HALF) * step,
            e2m1(second) * _block_scales(scales + blocks, swap, blocks, HALF) * step,
        )


@triton.jit
@no_type_check
def _block_scales(scales, swap, BLOCKS: tl.constexpr, HALF: tl.constexpr):
    """The scale of each channel of half a vector, which has one block, or blocks of 16."""
    width: tl.constexpr = HALF if BLOCKS == 1 else 16
    block = tl.arange(0, HALF // width)
    scale = e4m3(tl.load(scales + block, mask=(block < BLOCKS) & swap, other=0))
    return tl.reshape(tl.broadcast_to(scale[:, None], (HALF // width, width)), (HALF,))


@triton.jit
@no_type_check
def _write(
    codes, scale, more, slot, j, first, second, real, swap, H: tl.constexpr, HALF: tl.constexpr, FORM: tl.constexpr
):
    """Encode both halves of a vector into a slot, if `swap`."""
    mask = real & swap
    if FORM == "bf16" or FORM == "f32":
        code1, code2 = first.to(codes.dtype.element_ty), second.to(codes.dtype.element_ty)
    elif FORM == "int4":
        lowest = tl.minimum(tl.where(real, first, float("inf")), tl.where(real, second, float("inf")))
        low = _round_to_bf16(tl.min(lowest, 0))
        highest = tl.maximum(tl.where(real, first, float("-inf")), tl.where(real, second, float("-inf")))
        step = _scale(tl.max(highest, 0) - low, 15.0)
        tl.store(scale + slot, step.to(tl.bfloat16), mask=swap)
        tl.store(more + slot, low.to(tl.bfloat16), mask=swap)
        code1 = tl.clamp(_round(tl.div_rn(first - low, step)), 0.0, 15.0).to(tl.int32)
        code2 = tl.clamp(_round(tl.div_rn(second - low, step)), 0.0, 15.0).to(tl.int32)
    else:
        steps: tl.constexpr = 127.0 if FORM == "int8" else 448.0 if FORM == "fp8" else 6.0 * 448
        step = _scale(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0), steps)
        tl.store(scale + slot, step.to(tl.bfloat16), mask=swap)
        first, second = tl.div_rn(first, step), tl.div_rn(second, step)
        if FORM == "int8":
            code1, code2 = _round(first).to(tl.int8), _round(second).to(tl.int8)
        elif FORM == "fp8":
            code1, code2 = _to_e4m3(first), _to_e4m3(second)
        else:
            blocks: tl.constexpr = 1 if H <= 32 else H // 32
            code1 = _blocks_to_e2m1(first, more + slot * (2 * blocks), swap, blocks, HALF)
            code2 = _blocks_to_e2m1(second, more + slot * (2 * blocks) + blocks, swap, blocks, HALF)
    if FORM == "int4" or FORM == "nvfp4":
        tl.store(codes + slot * (H // 2) + j, (code1 | (code2 << 4)).to(tl.uint8), mask=mask)
    else:
        tl.store(codes + slot * H + j, code1, mask=mask)
        tl.store(codes + slot * H + H // 2 + j, code2, mask=mask)


@triton.jit
@no_type_check
def _scale(width, steps):
    """`codec._scale`."""
    return _round_to_bf16(tl.where(width > 0, tl.maximum(tl.div_rn(width, steps) * (1 + 2**-8), 2.0**-100), 1.0))


@triton.jit
@no_type_check
def _round_to_bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
@no_type_check
def _round(x):
    """To the nearest integer, half to even, for |x| < 2²²: in this range a float32 sum has no bits for fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
@no_type_check
def _to_e4m3(x):
    """The bits of the nearest e4m3 number, half to even, for |x| up to 448."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Seven bits of exponent and mantissa, below 2⁻⁶ a multiple of 2⁻⁹; rounding up carries into the exponent.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = _round(tl.abs(x) * 512).to(tl.int32).to(tl.uint32)
    return (tl.where(tl.abs(x) < 2**-6, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
@no_type_check
def _blocks_to_e2m1(x, scales, swap, BLOCKS: tl.constexpr, HALF: tl.constexpr):
    """Half a vector's codes, and the scale of each of its blocks into the slot."""
    width: tl.constexpr = HALF if BLOCKS == 1 else 16
    padded: tl.constexpr = HALF // width
    parts = tl.reshape(x, (padded, width))
    block = tl.arange(0, padded)
    code = _to_e4m3(tl.div_rn(tl.max(tl.abs(parts), 1), 6.0))
    tl.store(scales + block, code, mask=(block < BLOCKS) & swap)
    step = e4m3(code)
    unit = tl.reshape(tl.div_rn(parts, tl.where(step > 0, step, 1.0)[:, None]), (HALF,))
    size = tl.abs(unit)
    level = (size > 0.25).to(tl.int32) + (size > 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    level += (
        (size > 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size > 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    )
    return level | (unit < 0).to(tl.int32) << 3
