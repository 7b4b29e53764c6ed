"""The check of the kernels finds what it is there to find: each planted fault is caught, and the same kernel without it passes."""

import importlib.util
import itertools
import sys

import jax
import jax.numpy as jnp
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.eval.kernels import bench, check, tables
from kvcascade.eval.kernels.cases import Program
from kvcascade.kernels import aot, resources, traffic
from kvcascade.scripts import cli

pytest.importorskip("triton")
import planted  # noqa: E402

needs_compilers = pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="the extra [aot] is missing")
CARD = aot.GPU("card", 'core_count: 100\nmemory_bandwidth: 1e12\nclock_rate_ghz: 1\nshared_memory_per_block_optin: 100000\n'
               "registers_per_core_limit: 65536\nshared_memory_per_core: 102400\nthreads_per_core_limit: 2048\n")  # fmt: skip
COMPILED = {"launches": 1, "around": 0, "kernels": []}


@pytest.fixture(autouse=True)
def child(monkeypatch):
    monkeypatch.setattr(check, "CHILD", (sys.executable, planted.__file__))


def test_races_and_extra_reads_are_caught_and_a_child_that_aborts_fails_one_case(tmp_path):
    names = ["race", "abort", "no race", "extra read", "one read"]
    counted = []
    found = check._in_a_process("traffic", names, tmp_path / "traffic", lambda: counted.append(1))
    assert len(counted) == len(names) and "failed" in found.pop("abort")
    wrong = {
        name: tables.faults(check.record(planted.CASES[name], CARD, one, COMPILED), None) for name, one in found.items()
    }
    assert wrong["no race"] == wrong["one read"] == []
    (race,), (read,) = wrong["race"], wrong["extra read"]
    assert race.startswith("RACE DETECTED") and read == "moves 1.889 times the floor; at most 1.1 is allowed"
    assert found["no race"]["moved"] == found["no race"]["floor"] == 2 * 4 * planted.ROWS * planted.COLUMNS


@needs_compilers
def test_spills_and_too_much_shared_memory_are_caught(tmp_path):
    names = ["spill", "overflow", "one read"]
    found = check._in_a_process("h100", names, tmp_path / "h100", lambda: None)
    moved = {"moved": 1, "floor": 1, "units": 1, "races": False}
    wrong = {
        name: tables.faults(check.record(planted.CASES[name], aot.gpu("h100"), moved, one), None)
        for name, one in found.items()
    }
    assert wrong["one read"] == []
    (spill,), (overflow,) = wrong["spill"], wrong["overflow"]
    assert "gram spills" in spill and "a block has 232448" in overflow


def ptx(live: int, registers: int) -> str:
    """A kernel with so many numbers alive at once, in at most so many registers."""
    each = range(live)
    return "\n".join([
        ".version 8.0", ".target sm_80", ".address_size 64", f".visible .entry k(.param .u64 p) .reqntid 64 .maxnreg {registers}",
        "{", f".reg .f32 %f<{live}>;", ".reg .b64 %p;", "ld.param.u64 %p, [p];", "cvta.to.global.u64 %p, %p;",
        *(f"ld.global.f32 %f{i}, [%p+{4 * i}];" for i in each), "bar.sync 0;",
        *(f"st.global.f32 [%p+{4 * i}], %f{live - 1 - i};" for i in each), "ret;", "}",
    ])  # fmt: skip


def test_a_spill_is_what_the_assembler_says():
    (tight,), (wide,) = resources.assemble(ptx(64, 32)), resources.assemble(ptx(64, 128))
    assert tight.registers <= 32 and tight.spilled > 0
    assert wide.registers > 64 and wide.spilled == 0 and wide.threads == 64
    assert wide.code.rest["STG"] == 64 and wide.code.rest["BAR"] == 1 and not wide.code.loop


def kernel(**changes) -> resources.Kernel:
    figures = {"registers": 64, "spilled": 0, "shared_memory": 0, "threads": 128, "blocks": 1}
    return resources.Kernel("k", "triton", code=resources.code(""), **figures | changes)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 8),  # 65536 / (64 × 128)
        ({"registers": 65}, 7),  # handed out 256 to a warp
        ({"registers": 32, "threads": 96}, 21),  # threads: 2048 / 96
        ({"registers": 8, "threads": 32}, 32),
        ({"shared_memory": 24 << 10}, 4),  # a block takes 1 KiB more
        ({"shared_memory": 100001}, 0),
    ],
)
def test_blocks_that_fit_on_a_multiprocessor(changes, blocks):
    assert kernel(**changes).per_multiprocessor(CARD) == blocks


LISTING = """
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R2.64] ;
.L_x_2:
        /*0020*/              @!P0 FFMA R3, R2, R2, R3 ;
        /*0030*/              @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   FADD R3, R3, R3 ;
        /*0050*/                   FADD.FTZ R3, R3, R3 ;
        /*0060*/              @P1 BRA `(.L_x_3) ;
        /*0070*/              @P2 BRA `(.L_x_1) ;
        /*0080*/               @P0 EXIT ;
        /*0090*/                   STG.E [R2.64], R3 ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   SYNCS ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
        /*00e0*/                   NOP;
"""


def test_the_longest_inner_loop_is_told_apart():
    loop, rest = resources.code(LISTING)
    assert loop == {"FADD": 2, "BRA": 1}
    assert rest == {"MOV": 1, "LDG": 1, "FFMA": 1, "BRA": 2, "EXIT": 2, "STG": 1}


HLO = """HloModule jit_f, is_scheduled=true

%sliced (p.0: f32[8,128], p.1: s32[]) -> f32[1,128] {
  %p.0 = f32[8,128]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %b = f32[8,128]{1,0} bitcast(%p.0)
  ROOT %d = f32[1,128]{1,0} dynamic-slice(%b, %p.1, %p.1), dynamic_slice_sizes={1,128}
}

%put (q.0: bf16[8,128], q.1: bf16[1,128], q.2: s32[]) -> (bf16[8,128], bf16[1,128]) {
  %q.0 = bf16[8,128]{1,0} parameter(0)
  %q.1 = bf16[1,128]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %n = bf16[1,128]{1,0} negate(%q.1)
  %u = bf16[8,128]{1,0} dynamic-update-slice(%q.0, %n, %q.2, %q.2)
  ROOT %t = (bf16[8,128]{1,0}, bf16[1,128]{1,0}) tuple(%u, %n)
}

%body (s: (f32[4], s32[])) -> (f32[4], s32[]) {
  %s = (f32[4]{0}, s32[]) parameter(0)
  %g = f32[4]{0} get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %c = f32[4]{0} copy(%g)
  ROOT %r = (f32[4]{0}, s32[]) tuple(%c, %i)
}

ENTRY %main (a: f32[8,128], i: s32[], k: bf16[8,128], v: bf16[1,128], w: (f32[4], s32[])) -> f32[1,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %k = bf16[8,128]{1,0} parameter(2)
  %v = bf16[1,128]{1,0} parameter(3)
  %w = (f32[4]{0}, /*index=1*/s32[]) parameter(4)
  %one = f32[1,128]{1,0} fusion(%a, %i.1), kind=kLoop, calls=%sliced
  %two = (bf16[8,128]{1,0}, bf16[1,128]{1,0}) fusion(%k, %v, %i.1), kind=kLoop, calls=%put
  %loop = (f32[4]{0}, s32[]) while(%w), condition=%c0, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %three = f32[1,128]{1,0} custom-call(%one, %a), custom_call_target="triton_kernel_call_ffi"
}
"""


def test_launches_of_a_program_and_the_bytes_that_each_moves():
    one, two, *copies, three = traffic.launches(HLO)
    assert one.moved == 2 * 512 + 4  # a slice of its operand
    assert two.moved == 256 + 256 + 256 + 4  # in place: the update is written, the rest stays
    assert [copy.moved for copy in copies] == [32] * 3
    assert three.moved == 512 + 512 + 4096 and three.target == "triton_kernel_call_ffi"


def test_the_page_shows_every_kernel_and_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "gpu", lambda name: CARD)
    found = check.record(
        planted.CASES["one read"], CARD, {"moved": 10, "floor": 5, "units": 1, "races": False},
        COMPILED | {"kernels": [vars(kernel()) | {"per_multiprocessor": 8, "blocks_in_use": 80, "code": {"loop": {}, "rest": {"MOV": 3}}}]},
    )  # fmt: skip
    assert found["kernels"][0]["waves"] == 0.1 and found["instructions"] == 3 * 128
    found |= {"versions": {"jax": "1"}, "commit": "c"}
    tables.write(tmp_path / "page.html", [found, found | {"failed": "<no>"}], ["a & <b>"], "kvcascade kernels check")
    page = (tmp_path / "page.html").read_text()
    assert (
        "<td>gram, , triton</td>" in page
        and "a &amp; &lt;b&gt;" in page
        and "<td>failed</td>" in page
        and "3 MOV" in page
    )


def figures(**changes) -> dict:
    start = {
        "kind": "kernel",
        "case": "a",
        "gpu": "h100",
        "most": 1.1,
        "own": 1.0,
        "ratio": 1.05,
        "instructions": 10.0,
        "launches": 2,
        "races": False,
    }
    kernel = {"name": "k", "compiler": "triton", "spilled": 0, "shared_memory": 5, "registers": 100}
    return start | {"shared_memory_limit": 10, "kernels": [kernel | changes.pop("kernel", {})]} | changes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"ratio": 1.06, "instructions": 10.5}, []),
        ({"ratio": 1.07}, ["a on h100: ratio 1.07, where it was 1.05"]),
        ({"instructions": 10.6}, ["a on h100: instructions 10.6, where it was 10"]),
        ({"own": 1.02}, ["a on h100: own 1.02, where it was 1"]),
        (
            {"own": 1.2},
            ["a on h100: moves 1.200 times the floor; at most 1.1 is allowed", "a on h100: own 1.2, where it was 1"],
        ),
        ({"launches": 3}, ["a on h100: launches 3, where it was 2"]),
        ({"kernel": {"registers": 105}}, []),
        ({"kernel": {"registers": 106}}, ["a on h100: registers 106, where it was 100"]),
        ({"kernel": {"shared_memory": 6}}, ["a on h100: shared_memory 6, where it was 5"]),
        ({"kernel": {"spilled": 4}}, ["a on h100: k spills 4 bytes of registers"]),
        ({"case": "b"}, ["a on h100: is not there any more"]),
        ({"gpu": "a100"}, []),
    ],
)
def test_worse_than_the_baseline(changes, told):
    assert tables.regressions([figures(**changes)], [figures()]) == told


def test_what_failed_or_is_refused():
    bare = {"kind": "kernel", "case": "a", "gpu": "h100", "most": 1.1}
    assert tables.regressions([bare | {"failed": "no"}], []) == ["a on h100: no"]
    assert tables.regressions([bare | {"refused": "no"}], []) == []
    assert tables.regressions([bare | {"refused": "no"}], [figures()]) == ["a on h100: no"]


def test_an_unknown_card_is_named():
    with pytest.raises(BadInput, match="no GPU 'h101'; there are h100"):
        check.cards(["h101"])


def test_without_the_compilers_one_line_says_what_to_install(monkeypatch, capfd):
    def missing(name):
        raise aot.NotInstalled(aot.MISSING)

    monkeypatch.setattr(aot, "gpu", missing)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["kernels", "check"])
    assert capfd.readouterr().err == f"kvcascade: {aot.MISSING}\n"


def test_the_budget_is_what_a_card_issues_while_its_memory_moves_a_unit():
    assert check.budget(CARD, 2.0) == 100 * 128 * 1e9 / (1e12 / 2)


def test_seconds_of_a_call_and_their_table(monkeypatch):
    with monkeypatch.context() as clock:
        clock.setattr(bench.time, "perf_counter", itertools.count(0, 12).__next__)
        assert bench.seconds(lambda x: x + 1, [(jnp.ones(3),)] * 8, 3) == 12 / 8
    monkeypatch.setattr(bench, "PASSED", 1 << 20)
    program = Program(lambda x: x + 1, lambda: (jnp.ones(1 << 17),), 1)
    record = {
        "case": "a",
        "device": "cpu",
        "floor": program.floor,
        "copy_bandwidth": bench.copy_bandwidth(1 << 20),
    }
    record |= {"call_seconds": bench.timed(program), "peer_seconds": 2.0}
    title, columns, rows = bench.table([record, record | {"refused": "no"}])
    assert all(len(row) == len(columns) for row in rows) and rows[0][0] == "a" and rows[1][0] == "a: no"


def test_without_a_gpu_there_is_nothing_to_time():
    if jax.default_backend() == "cpu":
        with pytest.raises(BadInput, match="no GPU"):
            bench.bench([])
