"""README's results are those of the recorded tables, and what the tables and their arithmetic say is right."""

import importlib
import pathlib
import sys

import pytest
import torch
from conftest import DEVICE

from omni_kernels import brute_force_router, factored_router

pytest.importorskip("seaborn")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
speed, tables = (importlib.import_module(name) for name in ("speed_study", "tables"))

MAIN, SMALL = speed.MAIN, speed.Case(7, 8, 4, "fp32")
LIMITS = {"bandwidth_gbs": 3000.0, "empty_us": 1.5}


@pytest.fixture
def no_tables(tmp_path, monkeypatch):
    """Tables are written to and read from an empty folder."""
    monkeypatch.setattr(tables, "DATA", tmp_path)
    monkeypatch.setattr(tables, "RECORDED", tmp_path)


@pytest.fixture
def recorded_tables(monkeypatch):
    """Only the committed tables are read."""
    monkeypatch.setattr(tables, "DATA", tables.RECORDED)


def add_run(monkeypatch, gpu, source, table, *rows):
    run = {"gpu": gpu, "torch": "2.0", "triton": "3.0", "source": source, "commit": "abc", "date": "2030-01-02"}
    monkeypatch.setattr(tables, "setting", lambda: run)
    tables.append(table, rows)


def row(case, rival, us, **more):
    limits = {"floor_us": speed.floor_us(case, 3000.0), **LIMITS}
    return {"rival": rival, **case._asdict(), "us": us, "check": "equal", "error": None, **limits, **more}


def test_readme_holds_the_recorded_results(recorded_tables):
    text = speed.README.read_text()
    assert speed.with_results(text) == text, "run notebooks/study.py --readme"


@pytest.mark.parametrize("table", speed.TIMED)
def test_recorded_rows_are_sound(table, recorded_tables):
    wrong = []
    for found in speed.latest(table).itertuples():
        floor = speed.floor_us(speed.Case(*(getattr(found, size) for size in speed.CASE)), found.bandwidth_gbs)
        if found.rival == speed.OMNI:
            sound = found.check == "equal"
        else:
            sound = found.check in ("equal", "ties", "inexact") or isinstance(found.error, str)
        if not sound or abs(found.floor_us / floor - 1) > 1e-6:
            wrong.append(found)
    assert wrong == []


def test_the_floor_is_the_bytes_over_the_bandwidth():
    assert speed.num_bytes(MAIN) == 65536 * (2 * 256 * 2 + 16 * (2 + 4))
    assert speed.num_bytes(MAIN._replace(dtype="fp32")) == 65536 * (2 * 256 * 4 + 16 * (4 + 4))
    assert speed.floor_us(MAIN, 3004) == pytest.approx(24.43, abs=0.01)


def test_what_each_family_looks_at():
    looked_at = {name: speed.examined(name, 256, 16) for name in (speed.ORIGINAL, speed.FACTORED, speed.OMNI)}
    assert looked_at == {speed.ORIGINAL: 65536, speed.FACTORED: 512 + 256, speed.OMNI: 512 + 50}
    assert speed.examined(speed.OMNI, 2, 3) == 4 + 3  # ranks that a factor of two does not have are no candidates


def test_readme_without_a_table(no_tables):
    filled = speed.with_results(f"before\n{speed.MARKS[0]}\nold\n{speed.MARKS[1]}\nafter\n")
    assert filled == f"before\n{speed.MARKS[0]}\n\n{speed.NO_RESULTS}\n\n{speed.MARKS[1]}\nafter\n"


def test_results_are_of_the_last_run_of_each_gpu_h100_first(no_tables, monkeypatch):
    add_run(monkeypatch, "A GPU", "new", "targets", row(MAIN, speed.OMNI, 500.0), row(MAIN, speed.QUACK, 1500.0))
    add_run(monkeypatch, "An H100", "old", "targets", row(SMALL, speed.OMNI, 1.0))
    add_run(monkeypatch, "An H100", "new", "targets", row(MAIN, speed.OMNI, 99.0))
    failed = row(MAIN, speed.FACTORED, None, check=None, error="OutOfMemoryError")
    add_run(
        monkeypatch, "An H100", "new", "targets", row(MAIN, speed.OMNI, 50.0), row(MAIN, speed.QUACK, 160.0), failed
    )
    lines = speed.told("targets", speed.targets_table).splitlines()
    described, cases = lines[::6], [line for line in lines if line.startswith("| 65536")]
    assert described == [f"{gpu}, PyTorch 2.0, Triton 3.0, 2030-01-02, commit abc:" for gpu in ("An H100", "A GPU")]
    assert cases == [
        "| 65536 | 256 | 16 | bf16 | 24.5 | 50 | 49% | equal | QuACK top-k, compiled, 3.2× |",
        "| 65536 | 256 | 16 | bf16 | 24.5 | 500 | 4.9% | equal | QuACK top-k, compiled, 3× |",
    ]


def test_ladder_compares_each_rung_with_the_last_that_ran(no_tables, monkeypatch):
    failed = row(MAIN, speed.QUACK, None, check=None, error="not installed: quack")
    rows = row(MAIN, speed.FACTORED, 2000.0), failed, row(MAIN, speed.OMNI, 50.0)
    add_run(monkeypatch, "A GPU", "new", "ladder", *rows)
    cells = [
        [cell.strip() for cell in line.split("|")] for line in speed.told("ladder", speed.ladder_table).splitlines()
    ]
    assert [line[1:6] for line in cells[4:]] == [
        [speed.FACTORED, "2,000", "–", "1.2%", "equal"],
        [speed.QUACK, "–", "–", "–", "not installed: quack"],
        [speed.OMNI, "50", "40×", "49%", "equal"],
    ]


def test_losses_are_told(no_tables, monkeypatch):
    rows = row(MAIN, speed.FACTORED, 40.0), row(MAIN, speed.OMNI, 50.0)
    add_run(monkeypatch, "A GPU", "new", "ladder", *rows)
    guide = speed.Case(1024, 64, 16, "bf16")
    times = {speed.ORIGINAL: 52.0, speed.OPTIMIZED: 50.0, speed.OMNI: 3.0}
    add_run(monkeypatch, "A GPU", "new", "guide", *(row(guide, name, us) for name, us in times.items()))
    slower, rung, gain = speed.losses()
    assert slower == "A GPU, 65536 256 16 bf16: omni_router takes 1.25 times the time of “PyTorch, factored”"
    assert rung == "A GPU: “omni_router” is slower than “PyTorch, factored”, the rung before it"
    assert gain == "A GPU: the optimized kernels gain less than the guide expects at 64×64, k = 16"


def test_results_are_told_apart():
    x, y = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    want = brute_force_router(x, y, 2)
    assert speed.compare(want, want, x, y) == "equal"
    for experts, verdict in (((1, 0), "ties"), ((0, 0), "inexact"), ((0, 2), "inexact"), ((0, 9), "inexact")):
        assert speed.compare((want[0], torch.tensor([experts]).int()), want, x, y) == verdict
    assert speed.compare((want[0] + 1, want[1]), want, x, y) == "inexact"


@pytest.mark.parametrize("name", [speed.ALL_SUMS, speed.FACTORED, speed.ORIGINAL, speed.OPTIMIZED, speed.OMNI])
def test_rivals_route(name, device):
    x, y = speed.logits(SMALL)
    assert speed.compare(speed.RIVALS[name].route(x, y, 4), factored_router(x, y, 4), x, y) in ("equal", "ties")


def test_slices_of_all_sums_are_joined(monkeypatch, device):
    monkeypatch.setattr(speed, "SUMS_AT_ONCE", 2 * 8 * 8)
    x, y = speed.logits(SMALL)
    assert speed.compare(speed.pytorch_all_sums(x, y, 4), brute_force_router(x, y, 4), x, y) in ("equal", "ties")


def test_a_rival_that_fails_is_a_row(monkeypatch, device):
    def broken(x, y, k):
        raise ValueError("too many\nlines")

    def missing(x, y, k):
        raise ModuleNotFoundError("no", name="quack")

    routes = {"right": factored_router, "broken": broken, "missing": missing}
    monkeypatch.setattr(speed, "RIVALS", {name: speed.Rival(route, "", "") for name, route in routes.items()})
    monkeypatch.setattr(speed, "limits", lambda: LIMITS)
    monkeypatch.setattr(speed, "time_us", lambda call, method: [2.0, 1.0, 3.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    right, *failed = speed.timed_rows([(SMALL, list(routes))])
    assert right == {
        "rival": "right", **SMALL._asdict(), "method": "graph", "us": 2.0, "us_10": 1.0, "us_90": 3.0, "check": "equal",
        "error": None, "floor_us": 7 * (2 * 8 * 4 + 4 * 8) / 3e6, **LIMITS,
    }  # fmt: skip
    assert [(row["error"], row["us"]) for row in failed] == [
        ("ValueError: too many", None),
        ("not installed: quack", None),
    ]


def test_what_is_measured_is_not_measured_again(no_tables, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "_compile_ahead", compiled.append)
    for function in ("timed_rows", "memory_rows", "first_call_rows"):
        monkeypatch.setattr(speed, function, lambda work: [row(MAIN, speed.OMNI, 50.0)])
    add_run(monkeypatch, "A GPU", "new", "ladder", row(MAIN, speed.OMNI, 50.0))
    done = speed.measure(again=False)
    assert done.pop("ladder") == "measured before"
    assert all(what.startswith("measured now") for what in done.values())
    assert len(compiled[0]) == sum(
        len(work) for table, work in speed.TABLES.items() if table not in ("ladder", "first_calls")
    )
    assert set(speed.measure(again=False).values()) == {"measured before"}
    assert all(what.startswith("measured now") for what in speed.measure(again=True).values())


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU would measure")
def test_without_a_gpu_nothing_is_measured():
    assert set(speed.measure(again=True).values()) == {"not measured: no GPU here"}


@pytest.mark.parametrize("name", [speed.RUNGS[0], speed.RUNGS[-1]])
def test_rungs_launch_their_own_kernel(name, device):
    x, y = speed.logits(SMALL._replace(dtype="fp16"))
    assert speed.compare(speed.RIVALS[name].route(x, y, 4), factored_router(x, y, 4), x, y) == "equal"
    with pytest.raises(RuntimeError, match="another kernel"):
        speed._launched(speed.Changed(speed.lanes.lanes_kernel, {}), None)
