"""A table: columns that say what a cell is, and a terminal, Markdown and a page that show it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import rich.table
from rich.text import Text


class Column(NamedTuple):
    """A column's name, unit included; what gives a row's value where it has one, a key or a function; and its format."""

    name: str
    value: str | Callable[[Any], Any]
    form: str = "{}"

    def cell(self, row: Any) -> str:
        """The text of a row's cell."""
        get = row.get if isinstance(row, dict) else lambda key: getattr(row, key, None)
        value = get(self.value) if isinstance(self.value, str) else self.value(row)
        return "" if value is None else self.form.format(value)


class Table(NamedTuple):
    """A table in words."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, title: str, columns: Sequence[Column], rows: Iterable[Any]) -> "Table":
        """The cells of some rows."""
        return cls(title, [each.name for each in columns], [[each.cell(row) for each in columns] for row in rows])

    @property
    def code(self) -> "Table":
        """The same, its first column as Markdown's code."""
        return self.coded(self.columns[0])

    def coded(self, name: str) -> "Table":
        """The same, a column as Markdown's code."""
        at = self.columns.index(name)
        return self._replace(rows=[[*row[:at], f"`{row[at]}`", *row[at + 1 :]] for row in self.rows])


def brief(cache: str) -> str:
    """A cache's text, cut short where there are many parts, such as one for each layer; its record has all."""
    parts = cache.split(" ; ")
    return cache if len(parts) <= PARTS else f"{parts[0]} ; … ({len(parts)} parts)"


PARTS = 4
"""That a table has room for."""
CACHE = Column("cache", lambda row: brief(row.cache))
KV_BYTES = Column("KV bytes", "kv_bytes", "{:,}")
SAVED = Column("saved", "compression", "{:.1%}")
CONTEXT = Column("context", "context", "{:,}")


def on_terminal(table: Table) -> rich.table.Table:
    """A table as a terminal shows it: its first column is text, the others are figures."""
    # As Text, or the arguments of a policy, which stand in brackets, would be taken for markup and be lost.
    shown = rich.table.Table(title=Text(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def markdown(table: Table) -> str:
    """A table as GitHub shows it; the pipes of a spec are escaped."""
    escape = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return "\n".join([escape(table.columns), "|" + "---|" * len(table.columns), *map(escape, table.rows)])
