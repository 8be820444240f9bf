"""What measures two GPUs runs in two processes on the CPU, and its rows are those that the targets are about."""

import importlib
import pathlib
import sys

import pytest

pytest.importorskip("seaborn")
pd = pytest.importorskip("pandas")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
many_gpus = importlib.import_module("many_gpus")


def test_two_processes_measure_all_that_has_a_target(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = pd.DataFrame(many_gpus.rows_of(many_gpus.SMALL, "gloo"))
    assert set(rows.check) == {"equal", "near"} and (rows.us > 0).all()
    targets = {(case, rival) for case, _, *rivals, _, _ in many_gpus.TARGETS for rival in rivals}
    on_gpus = {(case, rival) for case, rival in targets if rival.endswith(many_gpus.KERNEL)}
    assert targets - on_gpus <= set(zip(rows.case, rows.rival, strict=True))


def test_targets_compare_the_last_run(monkeypatch):
    of = {"case": many_gpus.FACTORS, "num_expert_sqrt": 4096}
    rows = [{**of, "rival": many_gpus.GATHER, "us": us} for us in (9.0, 100.0)]
    table = many_gpus.targets_table(pd.DataFrame([*rows, {**of, "rival": many_gpus.EXCHANGE, "us": 30.0}]))
    assert len(table.splitlines()) == 3 and "| 0.30 | 0.35 | 0.2 |" in table
