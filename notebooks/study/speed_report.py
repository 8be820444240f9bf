"""Notebook 03's tables and pictures of what speed.py has measured."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from .pictures import BLUE, GREEN, ORANGE, RED, finish, finish_labeled, fixed, panel_for_each_gpu
from .reports import NO_RESULTS, groups, latest, markdown, microseconds, share
from .rivals import ALL_SUMS, CASE, COMPILED, FACTORED, FRONTIER, LADDER, OMNI, OPTIMIZED, ORIGINAL, QUACK, RIVALS, Case
from .speed import MAIN, TIMED, examined, num_bytes

NOISE = 1.02  # times that differ by less are the same
GUIDE_EXPECTS = {64: (10, 20), 128: (15, 25), 256: (20, 35)}  # percent, of the forward pass
GUIDE_EXPECTS_BACKWARD = (5, 15)
HEADLINES = [
    MAIN, MAIN._replace(dtype="fp32"), MAIN._replace(num_tokens=1 << 20), MAIN._replace(num_tokens=1024),
    MAIN._replace(k=64), Case(262144, 1024, 16, "bf16"),
]  # fmt: skip
LINKS = {
    QUACK: "https://github.com/Dao-AILab/quack",
    FACTORED: "https://docs.pytorch.org/docs/stable/generated/torch.topk.html",
    COMPILED: "https://docs.pytorch.org/docs/stable/generated/torch.topk.html",
}


def ladder_table(rows):
    """The ladder of one GPU: each rung's time, how many times faster it is than the one above it in the list, its share
    of the floor's speed, how its result compares, and what is new in it."""
    lines, before = [], math.nan
    for row in _in_order(rows).itertuples():
        why = RIVALS[row.rival].why
        if row.us == row.us:
            step = f"{before / row.us:.3g}×" if before == before else "–"
            lines.append((row.rival, microseconds(row.us), step, share(row.floor_us, row.us), row.check, why))
            before = row.us
        else:
            lines.append((row.rival, "–", "–", "–", row.error, why))
    return markdown(["rung", "µs", "faster than the rung before", "of the floor's speed", "result", "what is new"],
                    lines)  # fmt: skip


def _in_order(rows):
    """The rungs from the first to the last, where a new one is at the end of its table. GPUs keep their order."""
    return rows.sort_values("rival", key=lambda names: names.map(LADDER.index), kind="stable")


def targets_table(rows):
    """omni_router of one GPU over all cases: its time, its share of the floor's speed, the time of a call from Python,
    and the other rivals' times."""
    lines = []
    for case, group in rows.groupby(CASE, sort=False):
        times = group.set_index("rival").us
        row = group.set_index("rival").loc[OMNI]
        other = _fastest_other(times)
        best = f"{other}, {times[other] / row.us:.3g}×" if other and row.us == row.us else "–"
        check = row.check if row.us == row.us else row.error
        lines.append((*case, *map(microseconds, (row.floor_us, row.us)), share(row.floor_us, row.us),
                      microseconds(row.call_us), check, best))  # fmt: skip
    header = ["tokens", "N", "k", "dtype", "floor, µs", "`omni_router`, µs", "of the floor's speed", "a call, µs"]
    return markdown([*header, "result", "fastest other measured here, and how many times its time is"], lines)


def headline_table(rows):
    """The cases that README begins with: omni_router of one GPU beside the fastest other, kernels and calls."""
    lines = []
    for case, group in rows.groupby(CASE, sort=False):
        found = group.set_index("rival")
        ours, name = found.loc[OMNI], _fastest_other(found.us)
        if case not in HEADLINES or name is None:
            continue
        calls = [microseconds(row.call_us) for row in (ours, found.loc[name])]
        link = f"[{name}]({LINKS[name]})" if name in LINKS else name
        lines.append((*case, microseconds(ours.us), share(ours.floor_us, ours.us), microseconds(found.us[name]),
                      *calls, link))  # fmt: skip
    return markdown(["tokens", "N", "k", "dtype", "kernel, µs", "of the floor's speed", "other's kernels, µs",
                     "a call, µs", "other's call, µs", "the fastest other"], lines)  # fmt: skip


def _fastest_other(times):
    """The name of the fastest but omni_router, of times by rival, or None."""
    others = times.drop(OMNI).dropna()
    return others.idxmin() if len(others) else None


def layouts_table(rows):
    """omni_router of one GPU on logits that lie differently in memory."""
    lines = [
        (row.layout, row.num_tokens, row.num_expert_sqrt, row.k, row.dtype, microseconds(row.us),
         share(row.floor_us, row.us), row.check)
        for row in rows.itertuples()
    ]  # fmt: skip
    return markdown(["logits lie in", "tokens", "N", "k", "dtype", "µs", "of the floor's speed", "result"], lines)


def guide_table(rows):
    """Times and speedups over the original kernels, of one GPU, beside what the guide expects of the optimized ones;
    last the backward pass, whose times are in a table of their own."""
    lines = []
    for (size, k), group in rows.groupby(["num_expert_sqrt", "k"], sort=False):
        times = group.set_index("rival").us[[ORIGINAL, OPTIMIZED, OMNI]]
        lines.append(_guide_line(f"{size}×{size}, forward", k, times, GUIDE_EXPECTS[size]))
    backward = latest("backward")
    if len(backward):
        few = backward[(backward.gpu == rows.gpu.iloc[0]) & (backward.num_tokens == rows.num_tokens.iloc[0])]
        for (size, k), group in few.groupby(["num_expert_sqrt", "k"], sort=False):
            times = group.set_index("rival").us[["original kernel, atomics", "shared memory", "shared memory"]]
            lines.append(_guide_line(f"{size}×{size}, backward", k, times, GUIDE_EXPECTS_BACKWARD))
    return markdown(["experts", "k", "original, µs", "optimized, µs", "`omni_router`, µs", "optimized", "`omni_router`",
                     "the guide expects of optimized"], lines)  # fmt: skip


def _guide_line(experts, k, times, expected):
    original, *others = times
    gains = [f"{original / us:.3g}×" if us == us else "–" for us in others]
    low, high = (f"{1 + percent / 100:.3g}" for percent in expected)
    return experts, k, *map(microseconds, times), *gains, f"{low} to {high}×"


def distance():
    """How the way from the first rung to the last divides among the families of rungs, in words."""
    lines = []
    for gpu, rows in groups(latest("ladder"), "gpu"):
        rows = _in_order(rows)
        best = rows.groupby(rows.rival.map(lambda name: RIVALS[name].family), sort=False).us.min().dropna()
        before, steps = rows.us.dropna().iloc[0], []
        for family, us in best.items():
            steps.append(f"{before / us:.3g}× to {family}")
            before = us
        lines.append(f"{gpu}: {', '.join(steps)}")
    return lines or [NO_RESULTS]


def losses():
    """Everything that was measured and is not the best there is, by more than NOISE, in words."""
    found = []
    for table in TIMED:
        for (gpu, *case), group in groups(latest(table), ["gpu", *CASE]):
            times = group.set_index("rival").us.dropna()
            best = times.idxmin() if OMNI in times else None
            if best and times[OMNI] > NOISE * times[best]:
                slower = f"{times[OMNI] / times[best]:.3g} times the time of “{best}”"
                found.append(f"{gpu}, {' '.join(map(str, case))}: omni_router takes {slower}")
    for gpu, rows in groups(latest("ladder"), "gpu"):
        climbed = _in_order(rows).dropna(subset="us")
        for before, rung in itertools.pairwise(climbed.itertuples()):
            if rung.us > NOISE * before.us:
                found.append(f"{gpu}: “{rung.rival}” is slower than “{before.rival}”, the rung before it")
    for (gpu, size, k), group in groups(latest("guide"), ["gpu", "num_expert_sqrt", "k"]):
        times = group.set_index("rival").us
        if times[ORIGINAL] / times[OPTIMIZED] < 1 + GUIDE_EXPECTS[size][0] / 100:
            found.append(f"{gpu}: the optimized kernels gain less than the guide expects at {size}×{size}, k = {k}")
    return list(dict.fromkeys(found))


# --- pictures ---

FAMILIES = {
    "all N² sums": (RED, "v"), "compositions": (ORANGE, "s"), "factored kernels": (BLUE, "D"),
    "omni_router": (GREEN, "o"),
}  # fmt: skip


def draw_ladder(rows):
    """A dot for every rung, its time on a log scale, and how far that is from the floor; a panel for every GPU."""
    rows = _in_order(rows.dropna(subset="us"))
    figure, panels = panel_for_each_gpu(rows, width=8, height=5.8)
    for axes, (_, group) in zip(panels, groups(rows, "gpu"), strict=True):
        floor = group.floor_us.iloc[0]
        for place, row in enumerate(group.itertuples()):
            color, marker = FAMILIES[RIVALS[row.rival].family]
            axes.plot([floor, row.us], [place, place], color=color, linewidth=2.5, alpha=0.45)
            axes.plot(row.us, place, color=color, marker=marker, markersize=7)
            text = f"{microseconds(row.us)} µs, {share(row.floor_us, row.us)}"
            axes.annotate(text, (row.us, place), (8, 0), textcoords="offset points", va="center", fontsize=9)
        axes.axvline(floor, color="black", linestyle="--", linewidth=1.2)
        axes.text(floor, -0.75, f"floor, {microseconds(floor)} µs ", ha="right", va="center", fontsize=9)
        axes.set(xscale="log", xlim=(floor / 3, group.us.max() * 10), title=fixed(group),
                 xlabel="µs, share of the floor's speed")  # fmt: skip
        axes.set_yticks(range(len(group)), group.rival)
        axes.set_ylim(len(group) - 0.4, -1.2)
        axes.grid(False, axis="y")
    families = dict.fromkeys(RIVALS[name].family for name in rows.rival)
    handles = [plt.Line2D([], [], color=FAMILIES[name][0], marker=FAMILIES[name][1], markersize=7) for name in families]
    panels[0].legend(handles, families, loc="lower right", fontsize=9)
    return finish(figure)


STYLES = {
    ALL_SUMS: (RED, "v", ":"), ORIGINAL: (RED, "o", "-"), OPTIMIZED: (RED, "s", "--"), FACTORED: (ORANGE, "P", "-"),
    COMPILED: (ORANGE, "X", "--"), QUACK: (ORANGE, "^", ":"), FRONTIER: (BLUE, "D", "-"), OMNI: (GREEN, "o", "-"),
}  # fmt: skip


def draw_tokens(rows):
    return _draw_against(rows, "num_tokens", "tokens")


def draw_size(rows):
    return _draw_against(rows, "num_expert_sqrt", "N")


def draw_k(rows):
    return _draw_against(rows, "k", "k")


def _draw_against(rows, column, label):
    """Time against one size, a line for each rival, and the floor, no lower than an empty kernel; a panel for every
    GPU."""
    figure, panels = panel_for_each_gpu(rows, width=8, height=5.2)
    for axes, (_, group) in zip(panels, groups(rows, "gpu"), strict=True):
        _draw_lines(axes, group, column, "us")
        floor, empty = group.drop_duplicates(column).sort_values(column), group.empty_us.median()
        low, high = math.log2(floor[column].iloc[0]), math.log2(floor[column].iloc[-1])
        sizes = np.exp2(np.linspace(low, high, 200))
        floors = np.exp2(np.interp(np.log2(sizes), np.log2(floor[column]), np.log2(floor.floor_us)))
        if column == "num_tokens":
            seen = floors > 0.8 * empty
            sizes, floors = sizes[seen], floors[seen]
            axes.axhline(empty, color="0.4", linestyle=":", linewidth=1.4, label="empty kernel")
        axes.plot(sizes, floors, color="black", linestyle="--", linewidth=1.2, label="floor")
        axes.set(xlabel=label, ylabel="µs", title=fixed(group))
        axes.margins(x=0.03, y=0.09)
    return finish_labeled(figure)


def draw_memory(rows):
    """The memory a call takes against N; its results are the least it can be."""
    figure, panels = panel_for_each_gpu(rows, width=7.5, height=4.4)
    for axes, (_, group) in zip(panels, groups(rows, "gpu"), strict=True):
        _draw_lines(axes, group.assign(mebibytes=group.peak_bytes / 2**20), "num_expert_sqrt", "mebibytes")
        least = group.results_bytes.iloc[0] / 2**20
        axes.axhline(least, color="black", linestyle="--", linewidth=1.2, label="results alone")
        axes.set(xlabel="N", ylabel="MiB at the peak, without logits", title=fixed(group))
        axes.margins(y=0.12)
    return finish_labeled(figure)


def _draw_lines(axes, rows, column, value):
    rows = rows.dropna(subset=value)
    for name in [name for name in STYLES if name in set(rows.rival)]:
        color, marker, line = STYLES[name]
        group = rows[rows.rival == name].sort_values(column)
        axes.plot(group[column], group[value], color=color, marker=marker, linestyle=line, markersize=6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def draw_roofline(rows):
    """Bytes a second against the values looked at for each byte, a point for each rival in the main case: the copy is
    the roof, the diagonals are values a second."""
    rows = rows[(rows[CASE] == list(MAIN)).all(axis=1)].dropna(subset="us").drop_duplicates(["gpu", "rival"])
    figure, panels = panel_for_each_gpu(rows, width=8, height=5.8)
    for axes, (_, group) in zip(panels, groups(rows, "gpu"), strict=True):
        roof, gigabytes = group.bandwidth_gbs.median(), num_bytes(MAIN) / group.us / 1e3
        values = np.array([examined(name, MAIN.num_expert_sqrt, MAIN.k) for name in group.rival])
        intensity = values * MAIN.num_tokens / num_bytes(MAIN)
        left, right, bottom, top = intensity.min() / 3, 7 * intensity.max(), gigabytes.min() / 2, 2 * roof
        axes.axhline(roof, color="black", linestyle="--", linewidth=1.2, label=f"copy, {roof:,.0f} GB/s")
        for name, x, y in zip(group.rival, intensity, gigabytes, strict=True):
            color, marker, _ = STYLES[name]
            axes.plot(x, y, color=color, marker=marker, markersize=8, linestyle="none",
                      label=f"{name}, {microseconds(y)} GB/s")  # fmt: skip
        for power in range(9, 16):
            axes.plot([left, right], [10.0 ** (power - 9) / left, 10.0 ** (power - 9) / right], color="0.85", zorder=0)
            if bottom < 10.0 ** (power - 9) / right < top:
                axes.text(right, 10.0 ** (power - 9) / right, f" $10^{{{power}}}$ values/s", fontsize=8.5, va="center")
        axes.set(xscale="log", yscale="log", title=fixed(group),
                 xlabel="logits and sums looked at, for each byte moved", ylabel="GB/s of logits and results",
                 xlim=(left, right), ylim=(bottom, top))  # fmt: skip
    return finish_labeled(figure)


def draw_guide(rows):
    """Speedup over the original kernels at the guide's sizes, dots on both sides of 1, and the range it expects of the
    optimized ones."""
    figure, panels = panel_for_each_gpu(rows, width=8, height=4.4)
    for axes, (_, group) in zip(panels, groups(rows, "gpu"), strict=True):
        labels = []
        for place, ((size, k), case) in enumerate(group.groupby(["num_expert_sqrt", "k"], sort=False)):
            times = case.set_index("rival").us
            low, high = (1 + percent / 100 for percent in GUIDE_EXPECTS[size])
            band = {
                "color": "black",
                "alpha": 0.35,
                "label": None if labels else "the guide's expectation of optimized",
            }
            axes.fill_betweenx([place - 0.32, place + 0.32], low, high, linewidth=0, **band)
            for name, side in ((OPTIMIZED, -1), (OMNI, 1)):
                speedup, (color, marker, _) = times[ORIGINAL] / times[name], STYLES[name]
                axes.plot(speedup, place, color=color, marker=marker, markersize=8, linestyle="none",
                          label=None if labels else name)  # fmt: skip
                axes.annotate(f"{speedup:.3g}×", (speedup, place), (8 * side, 0), textcoords="offset points",
                              ha="left" if side > 0 else "right", va="center", fontsize=9)  # fmt: skip
            labels.append(f"N = {size}, k = {k}")
        axes.axvline(1, color="black", linewidth=1.2)
        axes.set(xscale="log", title=f"Forward, {fixed(group)}", xlabel="times as fast as the original kernels")
        low, high = axes.get_xlim()
        axes.set(xlim=(min(low, 0.8), 1.3 * high), ylim=(len(labels) - 0.4, -0.7))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yticks(range(len(labels)), labels)
        axes.legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.16), frameon=False)
    return finish(figure)
