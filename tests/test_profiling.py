"""What Nsight Compute prints is read as it is meant: units, separators, what it does not know, several kernels; and
so are the rows that come of it."""

import importlib
import pathlib
import sys

import pytest

pytest.importorskip("seaborn")
pd = pytest.importorskip("pandas")
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
    command = profiling.command("rung3_staircase", {"num_tokens": 512})
    asked = command[command.index("--metrics") + 1].split(",")
    assert {*profiling.SUMS.values(), *profiling.AVERAGES.values(), profiling.REGISTERS} == set(asked)
    assert set(METRICS) <= set(asked)
    assert command[-1].endswith("profiling.call_twice('rung3_staircase', **{'num_tokens': 512})")


# Notebook 07's report -------------------------------------------------------------------------------------------------

NAN = float("nan")
LIMITED = {
    "rival": "rung3_staircase", "num_tokens": 1000, "num_expert_sqrt": 256, "k": 16, "dtype": "bf16", "kernels": 1,
    "us": 50.0, "instructions": 3e6, "bank_conflicts": 6000.0, "dram_read_bytes": 1e6, "dram_write_bytes": 1.24e6,
    "l2_bytes": 3.36e6, "code_requests": 5e4, "issue_busy_percent": 80.0, "dram_percent": 20.0, "warps_active": 8.0,
    "stalls": "not_selected 4.00, sleeping 2.00, wait 1.00", "no_instruction": 0.5, "code_misses": 300.0,
    "registers": 43.0, "gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc", "date": "2030-01-02",
}  # fmt: skip
UNKNOWN = LIMITED | {"rival": "rung4_packed_keys", "stalls": NAN, "us": 25.0} | dict.fromkeys(
    ["dram_percent", "no_instruction", "bank_conflicts", "code_misses", "l2_bytes", "registers", "warps_active"], NAN
)  # fmt: skip


@pytest.fixture
def report(monkeypatch):
    """The report of two rows, the second with gaps, as a table of one GPU."""
    found = importlib.import_module("study.profiling_report")
    rows = pd.DataFrame([LIMITED, UNKNOWN])
    monkeypatch.setattr(found.reports, "latest", lambda table: rows if table == "profile" else pd.DataFrame())
    return found, rows


@pytest.mark.parametrize(
    ("table", "known", "unknown"),
    [
        ("slots_table", "1,000 | 1 | 50 | 80% | 20% | 40 | 10", "1,000 | 1 | 25 | 80% | – | 20 | –"),
        ("instructions_table", "3 | 3,000 | 2,950 | 0.50 | 0.1 | 2", "3 | 3,000 | 1,200 | – | – | –"),
        ("bytes_table", "1.12 | 1 | 1.24 | 2 | 2.24 | 3.36 | 3", "1.12 | 1 | 1.24 | 2 | 2.24 | – | –"),
        (
            "waits_table",
            "43 | 10 | 8.0 | 10.0 | not_selected 4.00, sleeping 2.00, wait 1.00, no_instruction 0.50",
            "– | – | – | – | –",
        ),
    ],
)
def test_a_row_is_told(report, table, known, unknown):
    found, rows = report
    lines = getattr(found, table)(rows).splitlines()[2:]
    assert lines == [f"| rung3_staircase | {known} |", f"| rung4_packed_keys | {unknown} |"]


def test_registers_leave_room_for_warps():
    found = importlib.import_module("study.profiling_report")
    assert [found.room_of(registers) for registers in (16, 32, 33, 40, 128, 129, 255)] == [16, 16, 12, 12, 4, 3, 2]


def test_limits_and_steps_are_told_in_words(report, monkeypatch):
    found, rows = report
    said = "rung3_staircase: nearer to the limit of its issue slots; slots 80% busy, DRAM 20%"
    assert found.verdicts() == [said, "rung4_packed_keys: not known"]
    (step,) = found.steps()
    assert step.endswith("a token: 1 times the instructions, 1 times the bytes of DRAM, 2 times the time")
    rows.loc[1, "num_tokens"] = 4000
    assert found.steps()[0].endswith("4 times the instructions, 4 times the bytes of DRAM, 8 times the time")
    assert found.shipped() == [found.reports.NO_RESULTS]
    rows.loc[0, "rival"] = found.OMNI
    assert found.shipped() == [
        "A GPU, 1,000 tokens: of 50 µs under ncu, 40 µs would be left if no issue slot were idle, and 10 µs if the "
        "DRAM were at its peak"
    ]
    layer = pd.DataFrame([LIMITED | {"rival": found.ROUTER_ALONE, "us": 25.0, "floor_us": 7.5}])
    monkeypatch.setattr(found.reports, "latest", lambda table: layer if table == "layer" else rows)
    assert "25 µs; ncu's time is 2 times that" in found.shipped()[1]
    assert "the bytes take 7.5 µs" in found.shipped()[1] and "would leave 20 µs" in found.shipped()[1]
    monkeypatch.setattr(found.reports, "latest", lambda table: pd.DataFrame())
    assert found.verdicts() == found.steps() == found.shipped() == [found.reports.NO_RESULTS]


def test_shares_of_a_warps_cycles_add_up(report):
    found, rows = report
    parts = found.parts_of(next(rows.itertuples()))
    assert sum(parts.values()) == pytest.approx(1)
    assert {name: share for name, share in parts.items() if share} == pytest.approx(
        {"selected": 0.1, "not_selected": 0.4, "wait": 0.1, "no_instruction": 0.05, "other": 0.35}
    )


def test_pictures_show_what_was_counted(report):
    found, rows = report
    (axes,) = found.draw_busy(rows).axes
    assert [text.get_text() for text in axes.texts] == [" 80%", " 20%"]  # a row without a share of the DRAM is none
    (axes,) = found.draw_instructions(rows).axes
    assert [text.get_text() for text in axes.texts] == ["3,000", "3,000"]
    assert axes.get_title(loc="left") == "A GPU, N = 256, k = 16, bf16"
    (axes,) = found.draw_waits(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rung3_staircase\n1,000 tokens"]
    assert [text.get_text() for text in axes.texts] == ["not\nselected", "other", "10"]
    found.pictures.plt.close("all")


def test_a_corner_is_told(report):
    found, rows = report
    waits = "10.0 | not_selected 4.00, sleeping 2.00, wait 1.00, no_instruction 0.50"
    assert found.corners_table(rows).splitlines()[2:] == [
        f"| 1,000 | 256 | 16 | bf16 | 50 | 80% | 20% | 3,000 | 43 | 8.0 | {waits} |",
        "| 1,000 | 256 | 16 | bf16 | 25 | 80% | – | 3,000 | – | – | – | – |",
    ]


def test_arithmetic_is_that_of_the_rungs():
    found = importlib.import_module("study.profiling_report")
    for name, count in found.ARITHMETIC.items():
        text = (profiling.LADDER / f"{name}.py").read_text(encoding="utf-8")
        assert ("half a million warp instructions a token" if count > 1e5 else str(count)) in " ".join(text.split())


def test_what_notebook_07_says_is_so_in_the_recorded_rows(monkeypatch):
    found = importlib.import_module("study.profiling_report")
    monkeypatch.setattr(found.reports.tables, "DATA", found.reports.tables.RECORDED)
    for _, rows in found.reports.latest("profile").groupby("gpu"):
        rows = rows.set_index("rival", drop=False)
        forward = rows[~rows.rival.str.startswith("backward")]
        stalls = {row.rival: found.stalls_of(row) for row in rows.itertuples()}
        assert list(rows.index) == profiling.names()
        assert list(forward.index[forward.dram_percent > forward.issue_busy_percent]) == ["rung1_all_sums"]
        assert max(stalls["rung1_all_sums"], key=stalls["rung1_all_sums"].get) == "long_scoreboard"
        assert [name for name in forward.index if "short_scoreboard" in stalls[name]] == ["rung3_staircase"]
        assert (rows.code_misses / rows.instructions).idxmax() == "rung6_row_a_lane"
        assert forward.no_instruction.idxmax() == "rung6_row_a_lane"
        assert (forward.bank_conflicts / forward.instructions).idxmax() == found.OMNI
        assert rows.registers.idxmax() == "rung6_row_a_lane"
        assert set(forward.issue_busy_percent.nlargest(2).index) == {"rung5_chunk_maxima", found.OMNI}
        assert 2 * forward.warps_active[found.OMNI] < forward.warps_active["rung5_chunk_maxima"]
        assert 0 < forward.issue_busy_percent[found.OMNI] - forward.dram_percent[found.OMNI]
        a_token = forward.instructions / forward.num_tokens
        assert a_token.iloc[1:].is_monotonic_decreasing and a_token.iloc[0] < a_token.iloc[1]
        next_wait = "long_scoreboard" if "H100" in rows.gpu.iloc[0] else "math_pipe_throttle"
        assert list(stalls[found.OMNI])[:2] == ["not_selected", next_wait]
    for _, rows in found.reports.latest("profile_corners").groupby("gpu"):
        longest = rows.stalls.str.split().str[0]
        few, short = rows.num_tokens < 65536, rows.num_expert_sqrt < 256
        many, wide = rows.k > 16, rows.dtype == "fp32"
        assert set(longest[few]) == {"no_instruction"} and rows.warps_active[few].max() < 1.05
        assert set(longest[short]) == {"not_selected"}
        assert rows.issue_busy_percent[short].min() > rows.issue_busy_percent[~short].max()
        assert rows.registers[many].min() > 150 and rows.warps_active[many].max() < 3
        assert rows.issue_busy_percent[many].max() < 65 and all("wait" in waits for waits in rows.stalls[many])
        assert rows.dram_percent[wide].item() > rows.issue_busy_percent[wide].item()
        instructions = rows.instructions[rows.k == 16][~few & ~wide].groupby(rows.num_expert_sqrt).first() / 65536
        main = found.reports.latest("profile").set_index(["gpu", "rival"]).loc[(rows.gpu.iloc[0], found.OMNI)]
        assert 0.45 < instructions[64] * main.num_tokens / main.instructions < 0.55
