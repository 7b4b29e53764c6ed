"""A smaller model that foresees what a larger one will say: the file that it is in, and what runs it behind the rows of an engine."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from kvcascade.cache.blocks import Table
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.cache.tier import BLOCK
from kvcascade.kernels import linear
from kvcascade.kernels.files import write_whole
from kvcascade.model import gpt, pretrained
from kvcascade.model.config import ModelConfig, built
from kvcascade.model.gpt import Params
from kvcascade.model.linear import filled, head_weights
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import Compiled
from kvcascade.model.weights import leaves, put
from kvcascade.serve.device import Device
from kvcascade.serve.plan import Limits, Plan, Row, Run, sizes
from kvcascade.serve.request import Asked

FORMAT = "kvcascade draft 1"


class Draft(NamedTuple):
    """A model that reads and says the tokens of another one."""

    config: ModelConfig
    params: Params
    fingerprint: str
    """What tells its weights from others."""


def write(path: Path, config: ModelConfig, params: Params, about: dict[str, Any]) -> str:
    """One file of a model whose weights are float32, whole or not at all; `about` says by `model_key` whose tokens it has. Returns its fingerprint."""
    said = {"format": FORMAT, "config": json.dumps(dataclasses.asdict(config)), "about": json.dumps(about)}
    arrays = {name: jnp.asarray(each, jnp.bfloat16) for name, each in leaves(params).items()}
    fingerprint = _fingerprint(arrays)  # `save` puts others in their place
    write_whole(path, save(arrays, said))
    return fingerprint


def _fingerprint(arrays: dict[str, Array]) -> str:
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.shape}".encode() + np.asarray(array).tobytes())
    return content.hexdigest()[:16]


def read(place: str, model: Model) -> Draft:
    """What `kvcascade distill` wrote, FILE.safetensors, or any pretrained model, its matrices kept as the model's are.

    BadInput for a file that is none, and for a model that has not the same tokens.
    """
    if not place.endswith(".safetensors"):
        found = pretrained.load(place, weights=model.config.weights)
        if _tokens(found) != _tokens(model):
            raise BadInput(f"{place} has other tokens than {model.name}, and so cannot foresee them")
        return Draft(found.config, found.params, found.fingerprint)
    try:
        with safe_open(Path(place).expanduser(), "flax") as file:
            said = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadInput(f"there is no draft {place}; kvcascade distill makes one") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{place} is no draft, or damaged: {error}") from None
    if said.get("format") != FORMAT:
        raise BadInput(f"{place} is no draft that this version reads; kvcascade distill makes one")
    config = built(ModelConfig, json.loads(said["config"]) | {"weights": model.config.weights}, place, "config")
    if json.loads(said["about"])["model_key"] != model.identity:
        raise BadInput(f"the draft {place} is of another model than {model.name}")
    params: Params = {}
    for name, array in arrays.items():
        folder, _, last = name.rpartition(".")
        if last == "weight":
            kind = head_weights(config) if folder in ("embed", "head") else config.weights
            matrix = linear.store(array.astype(jnp.float32), kind)
            for part, each in (filled(matrix) if kind == "int4" else matrix).items():
                put(params, f"{folder}.{part}", each)
        else:
            put(params, name, array.astype(jnp.float32))
    shapes = lambda tree: {name: each.shape for name, each in leaves(tree).items()}
    if shapes(params) != shapes(gpt.graph(config)[1]):
        raise BadInput(f"{place} is damaged: its arrays are not those of its shape")
    return Draft(config, params, _fingerprint(arrays))


def _tokens(model: Model) -> tuple[int, tuple[bytes | None, ...]]:
    """Rows of the embedding, and what each token stands for."""

    def one(token: int) -> bytes | None:
        try:
            return model.encoding.decode_single_token_bytes(token)
        except (KeyError, ValueError):
            return None

    return model.config.vocab, tuple(map(one, range(model.encoding.n_vocab)))


class Follower(Device):
    """A smaller model beside another's device: of each of that one's places it has read what the row there has, in blocks that are the place's own."""

    def __init__(self, draft: Draft, limits: Limits, context: int, compiled: Compiled):
        """BadInput for a model of a shorter context."""
        each, count = -(-context // BLOCK), limits.rows
        mine = Limits(limits.tokens, count, ahead=limits.ahead)
        spec, blocks = parse("full on blocks"), 1 + each * count
        super().__init__(
            draft.config, draft.params, spec, blocks, mine, context, fingerprint=draft.fingerprint, compiled=compiled
        )
        tables = [Table(b"", [*range(1 + place * each, 1 + (place + 1) * each)]) for place in range(count)]
        self._rows = [Row(-1, [], context, place=place, held=table) for place, table in enumerate(tables)]
        self._sure = [0] * count
        """Tokens of each place's row that are so, whatever was foreseen behind them."""
        self.passes = 0
        """How often the model has been read."""

    @property
    def _drafts(self) -> list[int]:
        return sizes(self.limits.rows)

    def foresee(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What this model draws for rows of the other device, each by its own seed and positions."""
        mine = [self._up_to(each.row) for each in asked]
        self._catch_up(mine)
        made = super().foresee([each._replace(row=row) for each, row in zip(asked, mine, strict=True)])
        self.passes += self.limits.ahead
        for row, tokens in zip(mine, made, strict=True):
            row.tokens += tokens[:-1]  # what was drawn has been read as well, but for the last of it
        return made

    def _up_to(self, row: Row) -> Row:
        """The row of a place, with another's tokens, and as much computed as of what has been read there is still so."""
        mine, read, now = self._rows[row.place], self._rows[row.place].tokens, row.tokens[:-1]
        known = self._sure[row.place] if mine.id == row.id else 0  # a row's tokens only become more
        while known < min(len(read), len(now)) and read[known] == now[known]:
            known += 1
        mine.id, mine.tokens, mine.table.computed = row.id, [*row.tokens], known
        self._sure[row.place] = len(now)
        return mine

    def _catch_up(self, rows: Sequence[Row]) -> None:
        """Compute the keys and values of all tokens but each row's last."""
        while behind := [row for row in rows if row.behind > 1]:
            runs, room = [], self.limits.tokens
            for row in behind:
                start, stop = row.table.computed, min(len(row.tokens) - 1, row.table.computed + room)
                runs += [Run(row, start, stop)] if start < stop else []
                room -= stop - start
            self.run(Plan(runs), {}, False)
            self.passes += 1
            for run in runs:
                run.row.table.computed = run.stop
