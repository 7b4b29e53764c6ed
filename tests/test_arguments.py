"""Numbers and texts from the command line."""

import dataclasses
import importlib
import os
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.scripts import arguments, cli
from kvcascade.scripts.arguments import Bounds, Count, Part, Seed, Share

CHECKED_THEMSELVES = ("Sampling", "RunConfig")


def numbers(wanted: object, bounded: bool = False) -> bool:
    """Whether there is a number in a type that has no bounds."""
    bounded |= any(isinstance(each, Bounds) for each in getattr(wanted, "__metadata__", ()))
    if wanted in (int, float):
        return not bounded
    return any(numbers(part, bounded) for part in typing.get_args(wanted))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_number_of_every_command_has_bounds(command: str) -> None:
    script = importlib.import_module(f"kvcascade.scripts.{command}")
    classes = [script.Args] if hasattr(script, "Args") else [script.Check, script.Bench]
    for each in classes:
        hints = typing.get_type_hints(each, include_extras=True)
        assert not [name for name, wanted in hints.items() if numbers(wanted)]
        nested = [
            wanted
            for wanted in hints.values()
            if dataclasses.is_dataclass(typing.get_args(wanted) and typing.get_args(wanted)[0])
        ]
        assert {typing.get_args(wanted)[0].__name__ for wanted in nested} <= {*CHECKED_THEMSELVES}


@dataclasses.dataclass(frozen=True)
class Args:
    count: Count = 1
    several: tuple[Count, ...] = ()
    maybe: Share | None = None
    out: Path | None = None
    files: tuple[Path, ...] = ()
    part: Part = 1.0
    seed: Seed = 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--count 0", "--count is 0; it must be at least 1"),
        ("--several 1 2 -1", "--several is -1; it must be at least 1"),
        ("--maybe nan", "--maybe is nan; it must be at least 0 and at most 1"),
        ("--maybe 1.1", "--maybe is 1.1; it must be at least 0 and at most 1"),
        ("--part 0", "--part is 0.0; it must be above 0 and at most 1"),
        ("--seed 4294967296", "--seed is 4294967296; it must be at least 0 and at most 4294967295"),
        ("--count x", "Error parsing --count: invalid literal for int() with base 10: 'x'"),
        ("--count", "Missing value for argument '--count'. Expected 1 values"),
        ("--cuont 1", "Unrecognized options: --cuont, 1"),
        ("--counts 1", "Unrecognized options: --counts, 1; did you mean --count?"),
        (f"--count {'9' * 5000}", "Error parsing --count: Exceeds the limit"),
    ],
)
def test_what_cannot_be_is_one_line(typed: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        arguments.arguments_of(Args, "x", typed.split())
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_what_can_be_is_taken() -> None:
    typed = ["--count", "2147483647", "--several", "1", "2", "--maybe", "0", "--part", "1", "--seed", "4294967295"]
    assert arguments.arguments_of(Args, "x", typed) == Args(2**31 - 1, (1, 2), 0.0, part=1.0, seed=2**32 - 1)
    assert arguments.arguments_of(Args, "x", []) == Args()


def test_paths_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a shell leaves ~ as it is, as in --out=~/x."""
    monkeypatch.setenv("HOME", "/home/x")
    args = arguments.arguments_of(Args, "x", ["--out=~/a", "--files", "~", "b"])
    assert (args.out, args.files) == (Path("/home/x/a"), (Path("/home/x"), Path("b")))


@given(
    st.sampled_from(["--count", "--several", "--maybe", "--part", "--seed"]),
    st.text(st.sampled_from("0123456789.-+einfa_ x"), max_size=12),
)
def test_any_text_is_a_number_in_bounds_or_one_line(flag: str, text: str) -> None:
    try:
        args = arguments.arguments_of(Args, "x", [f"{flag}={text}"])
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        arguments.check(args)


def test_a_text_in_any_bytes() -> None:
    """What is no UTF-8 becomes U+FFFD; in a locale of ASCII, whose bytes come one by one, UTF-8 is put together."""
    assert arguments.text(os.fsdecode(b"caf\xe9")) == "caf\ufffd"
    assert arguments.text(b"caf\xc3\xa9".decode("ascii", "surrogateescape")) == "café"
