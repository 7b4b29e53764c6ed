"""Measurements spread over processes: what one process finds, each once, and what came before a process died is kept."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.eval import measure, record_files
from kvcascade.eval.measure import Job
from kvcascade.eval.records import Layer, Record, of
from kvcascade.eval.spread import spread


@dataclasses.dataclass(frozen=True)
class Layers:
    """Lists of jobs that tell which process did them; one may go wrong."""

    lengths: tuple[int, ...]
    dies: int = -1
    refuses: int = -1

    def __call__(self) -> list[list[Job]]:
        return [[self._job(index, part) for part in range(length)] for index, length in enumerate(self.lengths)]

    def _job(self, index: int, part: int) -> Job:
        def once() -> list[Layer]:
            if index == self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == self.refuses:
                raise BadInput("not so many")
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            return [Layer(layer=f"{index}.{part}", codec=str(os.getpid()), bytes_per_token=cores)]

        return Job({"number": [index, part]}, "eval/quality", once, f"job {index}.{part}")


@pytest.fixture(autouse=True)
def _this_module_is_found(monkeypatch) -> None:
    """By the processes that are started, which read a recipe by the name of its class."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)


def layers(found: list) -> dict[str, Layer]:
    return {each.layer: each for each in of(found, Layer)}


def test_processes_do_each_measurement_once_and_a_list_of_them_together(tmp_path: Path) -> None:
    out, recipe, told = tmp_path / "records.jsonl", Layers((1, 3, 1, 2)), []
    (first,) = measure.measure(recipe()[0], out).records
    found = spread(recipe, recipe(), out, 2, tell=lambda done, words: told.append(done))
    assert found.before == 1 and told == [1, 2, 3, 4]
    assert [each.layer for each in found.records] == ["0.0", "1.0", "1.1", "1.2", "2.0", "3.0", "3.1"]
    by = layers(found.records)
    assert by["0.0"] == first and len({by[f"1.{part}"].codec for part in range(3)}) == 1
    elsewhere = {each.codec for each in by.values()} - {str(os.getpid())}
    assert 1 <= len(elsewhere) <= 2
    if hasattr(os, "sched_getaffinity"):
        mine = len(os.sched_getaffinity(0))
        assert by["1.0"].bytes_per_token == max(1, mine // 2) or mine % 2
    assert layers(record_files.read(out)).keys() == by.keys()
    assert all(isinstance(each, Record) and each.key and each.commit for each in found.records)
    again = spread(recipe, recipe(), out, 2)
    assert again.before == 4 and len(record_files.read(out)) == 7


@pytest.mark.parametrize(("wrong", "said"), [({"dies": 1}, "a process ended before"), ({"refuses": 1}, "not so many")])
def test_what_came_before_it_went_wrong_is_kept(tmp_path: Path, wrong: dict[str, int], said: str) -> None:
    """One line says what happened, and the same call goes on with what is missing."""
    out, recipe = tmp_path / "records.jsonl", Layers((1, 1, 1), **wrong)
    with pytest.raises(BadInput, match=said):
        spread(recipe, recipe(), out, 1)
    assert "0.0" in layers(record_files.read(out))
    whole = Layers((1, 1, 1))
    assert len(spread(whole, whole(), out, 1).records) == 3


def test_ray_is_said_to_be_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"kvcascade\[ray\]"):
        spread(Layers((1,)), Layers((1,))(), tmp_path / "records.jsonl", 1, "ray")
