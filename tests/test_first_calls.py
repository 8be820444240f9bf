"""First calls, made by a program that stands in for one with a GPU."""

import importlib
import pathlib
import sys
import threading
import time

import pytest

pytest.importorskip("seaborn")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
calls_report, first_calls, reports, rivals, tables = (
    importlib.import_module(f"study.{name}") for name in ("calls_report", "first_calls", "reports", "rivals", "tables")
)

# Prints what a call does; a rival named "broken" fails, and one named "full" has a full disk.
STAND_IN = """
import json, os, pathlib, sys
cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
cold = not cache.exists()
cache.mkdir(exist_ok=True)
assert input() == ("cold" if cold else "warm")
if sys.argv[1] == "broken":
    raise SystemExit("in vain\\nout of luck")
if sys.argv[1] == "full":
    print("No space left on device", file=sys.stderr)
    sys.exit(os.EX_IOERR)
print("Triton says something")
times = {"first_s": 7.25, "other_s": 0.21} if cold else {"first_s": 0.5, "later_s": 0.0021}
print(json.dumps(times | {"other_tokens": 16, "binary": "b"}))
"""
CASE = rivals.Case(65536, 256, 16, "bf16")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """What makes the calls, on a GPU that is not there; tables go to an empty folder."""
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(first_calls, "PROGRAM", [tmp_path / "program.py"])
    monkeypatch.setattr(first_calls, "CALLS", [(name, CASE) for name in ("quick", "broken")])
    monkeypatch.setattr(first_calls.torch.cuda, "is_available", lambda: True)
    for name in ("DATA", "RECORDED"):
        monkeypatch.setattr(tables, name, tmp_path)
    setting = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "c", "date": "2030-01-02"}
    monkeypatch.setattr(tables, "setting", lambda: setting)


def test_every_call_is_made_cold_and_warm_and_not_again(stand_in):
    assert first_calls.measure(again=False) == "2 measured now, 0 before"
    rows = tables.read("first_calls")
    assert rows[["rival", "cache"]].values.tolist() == [
        [name, cache] for cache in ("cold", "warm") for name in ("quick", "broken")
    ]
    quick, broken = (rows[rows.rival == name] for name in ("quick", "broken"))
    assert quick.first_s.tolist() == [7.25, 0.5]
    assert quick.error.isna().all()
    assert broken.error.tolist() == ["out of luck"] * 2
    assert first_calls.measure(again=False) == "0 measured now, 2 before"
    assert first_calls.measure(again=True) == "2 measured now, 0 before"
    assert len(tables.read("first_calls")) == 8


def test_a_call_that_is_new_is_measured_alone(stand_in, monkeypatch):
    first_calls.measure(again=False)
    monkeypatch.setattr(first_calls, "CALLS", [*first_calls.CALLS, ("quick", CASE._replace(k=8))])
    assert first_calls.measure(again=False) == "1 measured now, 2 before"


def test_a_full_disk_is_no_result(stand_in, monkeypatch):
    monkeypatch.setattr(first_calls, "CALLS", [("quick", CASE), ("full", CASE), ("quick", CASE)])
    with pytest.raises(OSError, match="No space left on device"):
        first_calls.measure(again=False)
    assert tables.read("first_calls").rival.tolist() == ["quick"]


def test_the_table(stand_in):
    first_calls.measure(again=False)
    assert reports.told("first_calls", calls_report.first_calls_table).splitlines()[-2:] == [
        "| quick | 65536 | 256 | 16 | bf16 | 7.25 s | 0.5 s | 16 | 0.21 s | 2.1 ms |",
        "| broken | 65536 | 256 | 16 | bf16 | out of luck | – | – | – | – |",
    ]


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_the_other_call_comes_at_once_or_when_nothing_is_left_to_compile(cache, monkeypatch, device):
    def compile_something():
        time.sleep(0.2)

    background, running = threading.Thread(target=compile_something, name="omni_kernels compile"), []

    def route(x, y, k):
        running.append(background.is_alive())
        if len(running) == 1:
            background.start()

    monkeypatch.setattr(first_calls.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(first_calls, "input", lambda: cache, raising=False)
    monkeypatch.setattr(rivals, "RIVALS", {"one": rivals.Rival(route, "", "")})
    found = first_calls.call("one", CASE._replace(num_tokens=2048, num_expert_sqrt=4, k=2))
    background.join()
    assert running[:2] == [False, cache == "cold"]
    assert set(found) == {"first_s", "other_tokens", "binary", "other_s" if cache == "cold" else "later_s"}


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(first_calls.torch.cuda, "is_available", lambda: False)
    assert first_calls.measure() == "not measured: no GPU here"
