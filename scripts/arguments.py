"""What is typed after a subcommand, checked before any work begins: one line and status 2 for what cannot be."""

import contextlib
import dataclasses
import io
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.serve.propose import Propose, proposer


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number may be; NaN is never within them."""

    least: int | float
    most: int | float
    above: bool = False
    """Whether `least` itself is too little."""

    def check(self, flag: str, value: int | float) -> None:
        """BadInput that names the flag if a value is out of bounds."""
        if not (self.least < value if self.above else self.least <= value) or not value <= self.most:
            low = f"{'above' if self.above else 'at least'} {self.least}"
            high = f" and at most {self.most}" if self.most <= 1 or value > self.most else ""
            raise BadInput(f"--{flag} is {value}; it must be {low}{high}")


INT32 = 2**31 - 1  # tokens, rows and positions are counted in int32
LONG = 1e9  # seconds, thirty years: what a clock can wait for

Count = Annotated[int, Bounds(1, INT32)]
CountOrNone = Annotated[int, Bounds(0, INT32)]
Window = Annotated[int, Bounds(2, INT32)]
"""Tokens of which at least one is scored."""
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
Share = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(0, 1, above=True)]
Seconds = Annotated[float, Bounds(0, LONG, above=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """Where measurements are kept."""

    out: Path | None = None
    """File that each measurement is appended to as it ends, as JSON lines; what it has of the same weights, text, protocol and code is not measured again."""
    again: bool = False
    """Measure also what the file has."""


def arguments_of[T](cls: type[T], command: str, arguments: list[str], default: T | None = None) -> T:
    """Read a subcommand's arguments into its dataclass; BadInput for a flag that is not there and a value that cannot be."""
    with _one_line():
        program = f"kvcascade {command}"
        if default is None:
            args = tyro.cli(cls, prog=program, args=arguments)
        else:
            args = tyro.cli(cls, prog=program, args=arguments, default=default)
    check(args)
    return _at_home(args)


def parse_command(classes: dict[str, Callable[..., Any]], command: str, arguments: list[str]) -> Any:
    """The same for a subcommand that has subcommands of its own."""
    with _one_line():
        args = tyro.extras.subcommand_cli_from_dict(classes, prog=f"kvcascade {command}", args=arguments)
    check(args)
    return _at_home(args)


def check(args: Any) -> None:
    """BadInput for a number of a dataclass that is out of the bounds in its type."""
    for name, wanted in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for bounds in _bounds(wanted):
            for each in value if isinstance(value, tuple) else (value,):
                if each is not None:
                    bounds.check(name.replace("_", "-"), each)


def _at_home(args: Any) -> Any:
    """The same with ~ at the start of paths replaced, which a shell leaves as it is in --out=~/x."""
    paths: dict[str, Any] = {}
    for name, value in vars(args).items():
        if isinstance(value, Path):
            paths[name] = value.expanduser()
        elif isinstance(value, tuple) and value and all(isinstance(each, Path) for each in value):
            paths[name] = tuple(each.expanduser() for each in value)
    return dataclasses.replace(args, **paths)


def share(flag: str, typed: str) -> float:
    """A share as it is typed, `0.1%`; BadInput for anything else."""
    if not re.fullmatch(r"\d+(\.\d+)?%", typed) or not float(typed[:-1]):
        raise BadInput(f"--{flag} is {typed}; it must be a share such as 0.1%")
    return float(typed[:-1]) / 100


def text(typed: str) -> str:
    """A text as it was typed, whatever the locale: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(typed).decode("utf-8", "replace")


def _bounds(wanted: Any) -> Iterator[Bounds]:
    yield from (each for each in getattr(wanted, "__metadata__", ()) if isinstance(each, Bounds))
    for part in typing.get_args(wanted):
        yield from _bounds(part)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What tyro says in a box becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise BadInput(_told(said.getvalue())) from None


def _told(box: str) -> str:
    """The reason in tyro's box, and the flags that it suggests."""
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰", "+"))]
    rule = next((at for at, line in enumerate(lines) if not line.strip("─-")), len(lines))
    reason = " ".join(lines[:rule]).rstrip(".")
    close = list(dict.fromkeys(re.findall(r"^(--[\w.-]+)", "\n".join(lines[rule:]), re.MULTILINE)))
    suggests = close and re.search("perhaps|similar|did you mean", box, re.IGNORECASE)
    return f"{reason}; did you mean {' or '.join(close[:3])}?" if suggests else reason


def foreseen(name: str, ahead: int) -> tuple[Propose | None, dict[str, Any]]:
    """What foresees tokens, and what limits are to say of it: nothing where nothing does; BadInput for what is no way to."""
    if name == "none":
        return None, {}
    propose, (kind, _, model) = proposer(name), name.partition(":")
    if propose is None or (kind == "draft") != bool(model):
        raise BadInput(f"what foresees is none, ngram, self or draft:MODEL, not {name}")
    return propose, {"ahead": ahead, "itself": name == "self"}
