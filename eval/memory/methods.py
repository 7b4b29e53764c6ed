"""What each policy keeps, by whom it is, what it reads, and the bytes that takes."""

import dataclasses
import inspect
import re

from kvcascade.cache.policies import POLICIES
from kvcascade.cache.policy import Policy
from kvcascade.cache.spec import DESCRIBED
from kvcascade.cache.statistic import Memory, Statistic
from kvcascade.eval.table import Column, Table
from kvcascade.eval.table import markdown as table_of
from kvcascade.kernels.heads import Heads
from kvcascade.model import known

SOURCE = r" \(([^()]*)\)"
NUMBER = 4  # bytes of a number that a token carries, per KV head


@dataclasses.dataclass(frozen=True)
class Method:
    """A policy with its defaults, beside the keys and values of a layer."""

    name: str
    policy: Policy
    heads: Heads

    @property
    def spec(self) -> str:
        """A tier of it."""
        return self.name if self.name == "full" else f"{self.name} 64"

    @property
    def keeps(self) -> str:
        """The first sentence of its docstring, without whose it is."""
        return re.sub(SOURCE, "", self._sentence).removeprefix("Keep ").removesuffix(".")

    @property
    def source(self) -> str:
        """What its docstring says of whose it is: a paper and its section."""
        return ", ".join(re.findall(SOURCE, self._sentence))

    @property
    def arguments(self) -> str:
        """Its arguments and their defaults, as a spec writes them."""
        return ", ".join(f"{f.name}={str(f.default).lower() or 'PATH'}" for f in dataclasses.fields(self.policy))

    @property
    def reads(self) -> str:
        """The statistics and memories that it ranks by."""
        read = [*self.policy.reads(), *self._memories()]
        return ", ".join(dict.fromkeys(type(each).__name__ for each in read))

    @property
    def per_token(self) -> int:
        """Bytes that each slot takes besides keys, values and position, in one layer."""
        return NUMBER * self.heads.kv * sum(isinstance(each, Statistic) for each in self.policy.reads())

    @property
    def per_layer(self) -> int:
        """Bytes that a row's layer remembers beside its slots."""
        return sum(each.nbytes(self.heads) for each in self._memories())

    @property
    def _sentence(self) -> str:
        return (inspect.getdoc(type(self.policy)) or "").split("\n")[0]

    def _memories(self) -> list[Memory]:
        read = self.policy.reads()
        direct = [each for each in read if isinstance(each, Memory)]
        return [*direct, *(m for each in read if isinstance(each, Statistic) for m in each.reads())]


def methods(heads: Heads) -> list[Method]:
    """All policies, in a layer of these heads."""
    return [Method(name, cls(), heads) for name, cls in POLICIES.items()]


def markdown() -> str:
    """The tables for the documentation, bytes of a model that is known by its shape."""
    found = table(known.KNOWN["llama3-8b"].layer_heads[0])
    return f"{table_of(found.code)}\n\nBytes: {found.title}.\n\n{table_of(presets().code)}"


def presets() -> Table:
    """A row for each name of a cache."""
    rows = [[name, each["cache"], each["source"]] for name, each in DESCRIBED.items()]
    return Table("presets", ["preset", "cache", "source"], rows)


def table(heads: Heads) -> Table:
    """A row for each policy."""
    columns = [
        Column("spec", "spec"),
        Column("keeps", "keeps"),
        Column("source", "source"),
        Column("arguments", "arguments"),
        Column("reads", "reads"),
        Column("bytes per slot", "per_token", "{:,}"),
        Column("bytes per layer", "per_layer", "{:,}"),
    ]
    vectors = heads.kv * (heads.width + heads.value_width) * 2
    title = f"in a layer of {heads.queries} query and {heads.kv} KV heads of {heads.width}, where bf16 keys and values of a token take {vectors:,} bytes"
    return Table.of(title, columns, methods(heads))
