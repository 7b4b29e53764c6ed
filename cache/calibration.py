"""What is known of a model's keys, values and queries beforehand, from a text that went through it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvcascade.cache.basis import Bases, Basis
from kvcascade.cache.codec import BASES, NAMES
from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import write_whole
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codecs

SMALL = 1e-4
"""Of the mean variance of a direction: no direction is taken to have less."""
FORMAT = "kvcascade calibration 1"


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of the keys, or of the values, of each KV head of a layer, as a cache is given them."""

    mean_KH: np.ndarray
    covariance_KHH: np.ndarray
    read_KHH: np.ndarray
    """How strongly attention reads each direction: of keys the second moments of the queries; of values their own, each as often as it was
    attended to (OSCAR, arXiv 2605.17757: CQ and ΣV)."""

    def basis(self, letter: str) -> Basis:
        """That of a codec's letter, `codec.BASES`."""
        if letter == "r":
            signs_H = np.random.default_rng(0).choice([-1.0, 1.0], self.mean_KH.shape[1])
            return Basis(scale_KH=_f32(np.broadcast_to(signs_H, self.mean_KH.shape)))
        if letter == "m":
            return Basis(shift_KH=_f32(self.mean_KH))
        if letter == "p":
            variance_KH, vectors_KHH = (x[..., ::-1] for x in np.linalg.eigh(self.covariance_KHH))
            deviation_K1H = _no_less(variance_KH)[:, None] ** 0.5
            matrix_KHH, inverse_KHH = vectors_KHH / deviation_K1H, (vectors_KHH * deviation_K1H).swapaxes(1, 2)
            return Basis(shift_KH=_f32(self.mean_KH), matrix_KHH=_f32(matrix_KHH), inverse_KHH=_f32(inverse_KHH))
        if letter == "s":
            variance_KH = np.diagonal(self.covariance_KHH, axis1=1, axis2=2)
            return Basis(shift_KH=_f32(self.mean_KH), scale_KH=_f32(_no_less(variance_KH) ** -0.5))
        _, vectors_KHH = np.linalg.eigh(self.read_KHH)
        falling = vectors_KHH[:, :, ::-1]  # by how much they are read, the most first
        return Basis(matrix_KHH=_f32(falling), inverse_KHH=_f32(falling.swapaxes(1, 2)))


def _no_less(variance_KH: np.ndarray) -> np.ndarray:
    """Variances of directions, none of them less than is taken for something."""
    return np.maximum(variance_KH, SMALL * variance_KH.mean(1, keepdims=True) + np.finfo(np.float32).tiny)


def _f32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.ascontiguousarray(x, np.float32))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The moments of every layer, and what model and text they are of."""

    k: tuple[Moments, ...]
    v: tuple[Moments, ...]
    gates: tuple[np.ndarray, ...]
    """Of each layer's heads the share of attention that goes neither to the first tokens nor to recent ones: what a streaming head would lose,
    after DuoAttention (arXiv 2410.10819), which trains a gate for it; for `allocate.duo`."""
    shares: tuple[np.ndarray, ...]
    """Of each layer's heads their part of the tokens that the layer attends to most; for `allocate.shared`."""
    about: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells its numbers from others."""
        found = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            found.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array, "<f4").tobytes())
        return found.hexdigest()[:16]

    def check(self, place: str, heads: Sequence[Heads]) -> None:
        """BadInput unless it is of layers with these heads; `place` is where it was read from."""
        shape = lambda moments: tuple(each.mean_KH.shape for each in moments)
        wanted = tuple((each.kv, each.width) for each in heads), tuple((each.kv, each.value_width) for each in heads)
        if (shape(self.k), shape(self.v)) != wanted:
            raise BadInput(f"the calibration {place} is of another model: its layers have not this one's heads")

    def _arrays(self) -> dict[str, np.ndarray]:
        fields = [field.name for field in dataclasses.fields(Moments)]
        return {
            f"{layer}.{which}.{field.partition('_')[0]}": getattr(moments, field)
            for which, every in (("k", self.k), ("v", self.v))
            for layer, moments in enumerate(every)
            for field in fields
        } | {
            f"{layer}.{name}": array for name in ("gates", "shares") for layer, array in enumerate(getattr(self, name))
        }

    def write(self, path: Path) -> None:
        """One file of it, whole or not at all; OSError where that cannot be."""
        text = {"format": FORMAT, "fingerprint": self.fingerprint, "about": json.dumps(self.about)}
        write_whole(path, save(self._arrays(), text))


def bases(codecs: Codecs, k: Moments, v: Moments, chosen: Sequence[int]) -> Bases | None:
    """The bases of a tier of KV heads with these moments."""
    if not codecs.k.basis and not codecs.v.basis:
        return None
    pairs = zip(codecs, (k, v), strict=True)
    return Bases(*(moments.basis(codec.basis) if codec.basis else Basis() for codec, moments in pairs)).of(chosen)


def unknown(heads: Heads) -> tuple[Moments, Moments]:
    """Moments of which nothing is known, for a basis that needs none."""
    none = lambda width: Moments(*(np.zeros((heads.kv, width, width)[:rank], np.float32) for rank in (2, 3, 3)))
    return none(heads.width), none(heads.value_width)


CALIBRATED = frozenset(BASES) - set("hr")
"""The bases that a calibration is needed for."""


def needed(codecs: str) -> bool:
    """Whether a codec of this name, or one of two for keys and values apart, needs a calibration."""
    return any(NAMES[name].basis in CALIBRATED for name in codecs.split("/") if name in NAMES)


def read(place: str) -> Calibration:
    """The calibration in a file; BadInput if there is none, or it is damaged. A process reads a file once."""
    return _read(Path(place).expanduser().resolve(), place)


@functools.lru_cache
def _read(path: Path, place: str) -> Calibration:
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(f"there is no calibration {place}; kvcascade calibrate makes one") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{place} is no calibration, or damaged: {error}") from None
    if about.get("format") != FORMAT:
        raise BadInput(f"{place} is no calibration: kvcascade calibrate makes one")
    try:
        layers = 1 + max(int(name.partition(".")[0]) for name in arrays)
        moments = lambda layer, which: Moments(
            *(arrays[f"{layer}.{which}.{name}"] for name in ("mean", "covariance", "read"))
        )
        k, v = (tuple(moments(layer, which) for layer in range(layers)) for which in "kv")
        gates, shares = (tuple(arrays[f"{layer}.{name}"] for layer in range(layers)) for name in ("gates", "shares"))
        found = Calibration(k, v, gates, shares, json.loads(about["about"]))
    except (LookupError, ValueError) as error:
        raise BadInput(f"{place} is damaged: {error}") from None
    if found.fingerprint != about.get("fingerprint"):
        raise BadInput(f"{place} is damaged: its numbers are not those that were written")
    return found
