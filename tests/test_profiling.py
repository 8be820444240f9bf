"""What Nsight Compute prints is read as it is meant: units, separators, what it does not know, several kernels."""

import importlib
import pathlib
import sys

import pytest

pytest.importorskip("pandas")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "notebooks"))
profiling = importlib.import_module("study.profiling")

METRICS = {
    "gpu__time_duration.sum": ("ns", ["30,000", "10000"]),
    "smsp__inst_executed.sum": ("inst", ["1,000,000", "500"]),
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": ("", ["0", "7"]),
    "dram__bytes_read.sum": ("Mbyte", ["1.5", "0.5"]),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("%", ["80", "40"]),
    "sm__icc_requests.sum": ("", ["n/a", "n/a"]),
    profiling.STALL.format("no_instruction"): ("inst", ["1", "1"]),
    profiling.STALL.format("long_scoreboard"): ("inst", ["4", "0"]),
    profiling.STALL.format("wait"): ("inst", ["0.5", "0.5"]),
    profiling.STALL.format("barrier"): ("inst", ["0.25", "0.25"]),
    "launch__registers_per_thread": ("register/thread", ["124", "32"]),
}


def printed(count):
    """What ncu prints of the first kernels, with what the profiled program prints around it."""
    rows = [["ID", "Kernel Name", *METRICS], ["", "", *(unit for unit, _ in METRICS.values())]]
    rows += [[str(i), f"kernel_{i}, of two", *(cells[i] for _, cells in METRICS.values())] for i in range(count)]
    table = [",".join(f'"{cell}"' for cell in row) for row in rows]
    return "\n".join(["==PROF== Connected to process 1", "hello", *table, "==PROF== Disconnected"])


def test_a_kernel_is_read_with_its_units():
    (kernel,) = profiling.kernels(printed(1))
    assert kernel["Kernel Name"] == "kernel_0, of two"
    assert kernel["gpu__time_duration.sum"] == 30.0
    assert kernel["dram__bytes_read.sum"] == 1.5e6
    assert kernel["smsp__inst_executed.sum"] == 1e6
    assert kernel["sm__icc_requests.sum"] is None


def test_kernels_of_a_rung_add_up():
    row = profiling.row_of(profiling.kernels(printed(2)))
    assert (row["kernels"], row["us"], row["instructions"], row["bank_conflicts"]) == (2, 40.0, 1000500, 7)
    assert row["dram_read_bytes"] == 2e6
    assert row["issue_busy_percent"] == (80 * 30 + 40 * 10) / 40
    assert row["stalls"] == "long_scoreboard 3.00, no_instruction 1.00, wait 0.50"
    assert (row["no_instruction"], row["registers"]) == (1.0, 124)
    assert row["l2_bytes"] is row["code_requests"] is row["code_misses"] is row["warps_active"] is None


def test_no_table_says_what_was_printed():
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        profiling.kernels("==ERROR== ERR_NVGPUCTRPERM")


def test_ncu_is_asked_for_every_column():
    command = profiling.command("rung3_staircase", 512)
    asked = command[command.index("--metrics") + 1].split(",")
    assert {*profiling.SUMS.values(), *profiling.AVERAGES.values(), profiling.REGISTERS} == set(asked)
    assert set(METRICS) <= set(asked)
    assert command[-1].endswith("profiling.call_twice('rung3_staircase', 512)")
