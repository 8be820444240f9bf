"""Notebook 07's tables, pictures and sentences of what profiling.py has counted."""

import itertools

import numpy as np
import seaborn as sns

from . import pictures, reports, speed
from .pictures import BLUE, GREEN, ORANGE, RED
from .reports import microseconds, number, share
from .rivals import CASE, OMNI, Case

ROUTER_ALONE = "router alone"  # omni_router in layer.py's table, in a CUDA graph
# Of an H100 and an H200, each scheduler: warps that it can hold, and registers for each lane of all of them.
MOST_WARPS, REGISTERS, ALLOCATED = 16, 512, 8  # the last: a warp's registers are a multiple of it
# Warp instructions a token that the rungs' docstrings calculate, for the case of the ladder.
ARITHMETIC = {
    "rung2_one_kernel": 512000, "rung3_staircase": 2950, "rung4_packed_keys": 1200, "rung5_chunk_maxima": 1150,
    "rung6_row_a_lane": 520,
}  # fmt: skip
SELECTED, OTHER = "selected", "other"


# --- what follows from a row ---


def least_bytes(row):
    """What a rung has to move: logits in and results out, or for a gradient as much the other way round."""
    return speed.num_bytes(Case(*(getattr(row, size) for size in CASE)))


def stalls_of(row):
    """Cycles that a warp waits for each of the reasons that a row names, from one of its instructions to the next."""
    parts = [part.split() for part in row.stalls.split(", ")] if isinstance(row.stalls, str) else []
    found = {reason: float(cycles) for reason, cycles in parts}
    return found if row.no_instruction != row.no_instruction else {**found, "no_instruction": row.no_instruction}


def cycles_of(row):
    """Cycles from one instruction of a warp to its next: of all warps of a scheduler one issues in a busy cycle."""
    return row.warps_active / (row.issue_busy_percent / 100)


def room_of(registers):
    """The warps that a scheduler's registers are enough for."""
    return min(MOST_WARPS, REGISTERS // (-(-registers // ALLOCATED) * ALLOCATED))


def bounds_of(row):
    """µs that would be left if no issue slot were idle, and if the DRAM moved the same bytes at its peak."""
    return row.us * row.issue_busy_percent / 100, row.us * row.dram_percent / 100


def _megabytes(num_bytes):
    return number(num_bytes / 1e6, ",.3g" if num_bytes < 1e8 else ",.0f")


def _times(value):
    return number(value, ",.0f" if value >= 100 else ".3g")


def _percent(value):
    return "–" if value != value else share(value, 100)


# --- tables ---


def slots_table(rows):
    """How busy issue slots and DRAM are, and the time that each of them alone would leave."""
    lines = [(row.rival, f"{row.num_tokens:,}", row.kernels, microseconds(row.us), _percent(row.issue_busy_percent),
              _percent(row.dram_percent), *map(microseconds, bounds_of(row)))
             for row in rows.itertuples()]  # fmt: skip
    return reports.markdown(["rung", "tokens", "kernels", "µs, under ncu", "issue slots busy", "DRAM busy",
                           "µs if no slot were idle", "µs if the DRAM were at its peak"], lines)  # fmt: skip


def instructions_table(rows):
    """Warp instructions, and what the instruction cache and shared memory's banks add to them."""
    lines = [(row.rival, number(row.instructions / 1e6, ",.4g"), _times(row.instructions / row.num_tokens),
              number(ARITHMETIC.get(row.rival, float("nan")), ","), number(row.no_instruction, ".2f"),
              *(number(1e3 * count / row.instructions, ".2g") for count in (row.code_misses, row.bank_conflicts)))
             for row in rows.itertuples()]  # fmt: skip
    return reports.markdown(["rung", "warp instructions, millions", "a token", "a token, by arithmetic",
                           "cycles without an instruction, for each issued", "code misses, for 1000 instructions",
                           "bank conflicts, for 1000 instructions"], lines)  # fmt: skip


def bytes_table(rows):
    """Bytes moved against the bytes that must move."""
    lines = []
    for row in rows.itertuples():
        least, dram = least_bytes(row), row.dram_read_bytes + row.dram_write_bytes
        lines.append((row.rival, _megabytes(least), _megabytes(row.dram_read_bytes), _megabytes(row.dram_write_bytes),
                      _times(dram / least), _times(dram / row.num_tokens / 1e3), _megabytes(row.l2_bytes),
                      _times(row.l2_bytes / least)))  # fmt: skip
    return reports.markdown(["rung", "must move, MB", "DRAM reads, MB", "DRAM writes, MB", "DRAM, times what must move",
                           "DRAM, KB a token", "L2, MB", "L2, times what must move"], lines)  # fmt: skip


def waits_table(rows):
    """The warps of a scheduler, and what each of them waits for between two instructions."""
    lines = []
    for row in rows.itertuples():
        stalls = ", ".join(f"{reason} {cycles:.2f}" for reason, cycles in stalls_of(row).items())
        room = "–" if row.registers != row.registers else room_of(int(row.registers))
        lines.append((row.rival, number(row.registers, ".0f"), room, number(row.warps_active, ".1f"),
                      number(cycles_of(row), ".1f"), stalls or "–"))  # fmt: skip
    return reports.markdown(["rung", "registers a lane", "warps a scheduler has registers for", "warps that it had",
                           "cycles from one instruction of a warp to its next", "of these, cycles that it waits for"],
                          lines)  # fmt: skip


def corners_table(rows):
    """The shipped router where memory is not its limit: how busy it is, and what its warps wait for."""
    lines = []
    for row in rows.itertuples():
        stalls = ", ".join(f"{reason} {cycles:.2f}" for reason, cycles in stalls_of(row).items())
        case = (f"{row.num_tokens:,}", row.num_expert_sqrt, row.k, row.dtype)
        lines.append((*case, microseconds(row.us), _percent(row.issue_busy_percent), _percent(row.dram_percent),
                      _times(row.instructions / row.num_tokens), number(row.registers, ".0f"),
                      number(row.warps_active, ".1f"), number(cycles_of(row), ".1f"), stalls or "–"))  # fmt: skip
    return reports.markdown(["tokens", "N", "k", "logits", "µs, under ncu", "issue slots busy", "DRAM busy",
                           "warp instructions a token", "registers a lane", "warps a scheduler had",
                           "cycles from one instruction of a warp to its next", "of these, cycles that it waits for"],
                          lines)  # fmt: skip


# --- sentences ---


def _of_gpus(tell):
    """What is told of the rows of each GPU, or that there are none."""
    lines = [line for _, rows in reports.groups(reports.latest("profile"), "gpu") for line in tell(rows)]
    return lines or [reports.NO_RESULTS]


def verdicts():
    """Which of two limits each rung is nearer to, in words."""
    return _of_gpus(lambda rows: [_verdict(row) for row in rows.itertuples()])


def _verdict(row):
    issue, dram = row.issue_busy_percent, row.dram_percent
    if issue != issue or dram != dram:
        return f"{row.rival}: not known"
    nearer = "issue slots" if issue > dram else "DRAM"
    return f"{row.rival}: nearer to the limit of its {nearer}; slots {_percent(issue)} busy, DRAM {_percent(dram)}"


def steps():
    """What a token takes on each rung, over what it takes on the next one, in words."""
    return _of_gpus(_steps)


def _steps(rows):
    lines = []
    for before, row in itertools.pairwise(rows.itertuples()):
        if before.rival.startswith("backward") != row.rival.startswith("backward"):
            continue
        per = row.num_tokens / before.num_tokens
        dram = [found.dram_read_bytes + found.dram_write_bytes for found in (before, row)]
        parts = [f"{_times(of * per)} times the {what}" for what, of in (
            ("instructions", before.instructions / row.instructions), ("bytes of DRAM", dram[0] / dram[1]),
            ("time", before.us / row.us),
        )]  # fmt: skip
        lines.append(f"{before.rival}, over {row.rival}, a token: {', '.join(parts)}")
    return lines


def shipped():
    """What the shipped router's row says, and how ncu's time compares with that of notebook 05, in words."""
    return _of_gpus(_shipped)


def _shipped(rows):
    row = next((row for row in rows.itertuples() if row.rival == OMNI), None)
    if row is None:
        return []
    slots, dram = bounds_of(row)
    lines = [f"{row.gpu}, {row.num_tokens:,} tokens: of {microseconds(row.us)} µs under ncu, "
             f"{microseconds(slots)} µs would be left if no issue slot were idle, and {microseconds(dram)} µs if the "
             "DRAM were at its peak"]  # fmt: skip
    times = reports.latest("layer")
    if len(times):
        times = times[times.gpu.eq(row.gpu) & times.rival.eq(ROUTER_ALONE)]
        times = times[(times[CASE] == [getattr(row, size) for size in CASE]).all(axis=1)]
    if len(times):
        us, floor = times.us.iloc[-1], times.floor_us.iloc[-1]
        faster = row.us / us
        lines.append(f"{row.gpu}, in a CUDA graph, at clocks that the GPU chooses: {microseconds(us)} µs; ncu's time "
                     f"is {faster:.3g} times that; at the speed of a copy the bytes take {microseconds(floor)} µs, and "
                     f"clocks faster by that factor would leave {microseconds(slots / faster)} µs if no slot were "
                     "idle")  # fmt: skip
    return lines


# --- pictures ---


def _panels(rows, width, height):
    """A figure, and its panel for every GPU with the rows of it, a rung a line."""
    figure, panels = pictures.panel_for_each_gpu(rows, width=width, height=height)
    groups = [group for _, group in rows.groupby("gpu", sort=False)]
    for axes, group in zip(panels, groups, strict=True):
        labels = [f"{row.rival}\n{row.num_tokens:,} tokens" for row in group.itertuples()]
        axes.set_yticks(range(len(group)), labels, fontsize=8.5)
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.set_title(pictures.fixed(group.drop(columns="num_tokens")))
        axes.grid(False, axis="y")
    return figure, zip(panels, groups, strict=True)


def draw_busy(rows):
    """Pairs of bars, issue slots and DRAM, of each rung."""
    figure, panels = _panels(rows.dropna(subset=["issue_busy_percent", "dram_percent"]), 8, 6.2)
    for axes, group in panels:
        places = np.arange(len(group))
        for offset, column, label, color, hatch in ((-0.2, "issue_busy_percent", "issue slots", BLUE, ""),
                                                    (0.2, "dram_percent", "DRAM", ORANGE, "///")):  # fmt: skip
            axes.barh(places + offset, group[column], height=0.38, color=color, hatch=hatch, edgecolor="white",
                      label=label)  # fmt: skip
            for place, value in zip(places, group[column], strict=True):
                axes.text(value, place + offset, f" {_percent(value)}", va="center", fontsize=8.5)
        axes.set(xlim=(0, 100), xlabel="% of the time busy, under ncu")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.11), ncols=2, frameon=False)
    return pictures.finish(figure)


def draw_instructions(rows):
    """Warp instructions a token of each rung: counted, and calculated before."""
    figure, panels = _panels(rows.dropna(subset="instructions"), 8, 5.2)
    for axes, group in panels:
        counted = group.instructions / group.num_tokens
        axes.plot(counted, range(len(group)), color=BLUE, marker="o", markersize=8, linestyle="none", label="counted")
        for place, (row, value) in enumerate(zip(group.itertuples(), counted, strict=True)):
            axes.annotate(_times(row.instructions / row.num_tokens), (value, place), (9, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
            if row.rival in ARITHMETIC:
                axes.plot(ARITHMETIC[row.rival], place, color=RED, marker="x", markersize=9, markeredgewidth=2,
                          linestyle="none")  # fmt: skip
        axes.plot([], [], color=RED, marker="x", markersize=9, markeredgewidth=2, linestyle="none",
                  label="by arithmetic, before")  # fmt: skip
        axes.set(xscale="log", xlim=(counted.min() / 2, counted.max() * 5), xlabel="warp instructions a token")
        axes.legend(loc="lower right", fontsize=9)
    return pictures.finish(figure)


# Those that no row names are "other".
FACES = {
    SELECTED: (GREEN, ""), "not_selected": (BLUE, ""), "math_pipe_throttle": (sns.light_palette(BLUE)[2], "///"),
    "wait": ("0.85", ""), "no_instruction": (RED, "xxx"), "long_scoreboard": (ORANGE, ""),
    "short_scoreboard": (ORANGE, "..."), "mio_throttle": (ORANGE, "\\\\\\"), "lg_throttle": (ORANGE, "|||"),
    "barrier": ("0.65", "---"), OTHER: ("white", ""),
}  # fmt: skip


def parts_of(row):
    """The share of a warp's cycles of each face: it issues one instruction, waits for what its row names, and else for
    what it does not."""
    parts = {SELECTED: 1.0, **dict.fromkeys(list(FACES)[1:], 0.0)}
    for reason, cycles in stalls_of(row).items():
        parts[reason if reason in FACES else OTHER] += cycles
    whole = max(cycles_of(row), sum(parts.values()))
    parts[OTHER] += whole - sum(parts.values())
    return {name: cycles / whole for name, cycles in parts.items()}


def draw_waits(rows):
    """What the cycles of a warp go to, stacked, of each rung."""
    figure, panels = _panels(rows.dropna(subset=["warps_active", "issue_busy_percent"]), 8.6, 6)
    for axes, group in panels:
        parts = [parts_of(row) for row in group.itertuples()]
        starts = np.zeros(len(group))
        for name, (color, hatch) in FACES.items():
            values = 100 * np.array([found[name] for found in parts])
            if values.any():
                axes.barh(range(len(group)), values, left=starts, color=color, hatch=hatch, edgecolor="0.35",
                          linewidth=0.6, height=0.7, label=name)  # fmt: skip
            for place, (start, value) in enumerate(zip(starts, values, strict=True)):
                if value >= 12:
                    text = "\n".join(name.replace("_", " ").rsplit(" ", 1))
                    axes.text(start + value / 2, place, text, ha="center", va="center", fontsize=7.5,
                              bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip
            starts += values
        for place, row in enumerate(group.itertuples()):
            axes.text(101, place, f"{cycles_of(row):.3g}", va="center", fontsize=9)
        axes.set(xlim=(0, 100), xlabel="% of a warp's cycles; at the right the cycles for each instruction")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.11), ncols=5, fontsize=8, frameon=False)
    return pictures.finish(figure)
