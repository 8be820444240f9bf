"""Notebook 03's tables and pictures of what speed.py has measured."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np

from .pictures import BLUE, GREEN, ORANGE, RED, finish, panel_for_each_gpu
from .reports import NO_RESULTS, groups, latest, markdown, microseconds, share
from .rivals import ALL_SUMS, CASE, COMPILED, FACTORED, FRONTIER, OMNI, OPTIMIZED, ORIGINAL, QUACK, RIVALS, Case
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
    for row in rows.itertuples():
        why = RIVALS[row.rival].why
        if row.us == row.us:
            step = f"{before / row.us:.3g}×" if before == before else "–"
            lines.append((row.rival, microseconds(row.us), step, share(row.floor_us, row.us), row.check, why))
            before = row.us
        else:
            lines.append((row.rival, "–", "–", "–", row.error, why))
    return markdown(["rung", "µs", "faster than the rung before", "of the floor's speed", "result", "why"], lines)


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
        climbed = rows.dropna(subset="us")
        for before, rung in itertools.pairwise(climbed.itertuples()):
            if rung.us > NOISE * before.us:
                found.append(f"{gpu}: “{rung.rival}” is slower than “{before.rival}”, the rung before it")
    for (gpu, size, k), group in groups(latest("guide"), ["gpu", "num_expert_sqrt", "k"]):
        times = group.set_index("rival").us
        if times[ORIGINAL] / times[OPTIMIZED] < 1 + GUIDE_EXPECTS[size][0] / 100:
            found.append(f"{gpu}: the optimized kernels gain less than the guide expects at {size}×{size}, k = {k}")
    return list(dict.fromkeys(found))


# --- pictures ---

COLORS = {"all N² sums": RED, "compositions": ORANGE, "factored kernels": BLUE, "omni_router": GREEN}


def draw_ladder(rows):
    """A bar for every rung, its time on a log scale, and the floor; a column of bars for every GPU."""
    rows = rows.dropna(subset="us")
    figure, panels = panel_for_each_gpu(rows, width=7.5, height=5.6)
    for axes, (gpu, group) in zip(panels, groups(rows, "gpu"), strict=True):
        places = np.arange(len(group))
        axes.barh(places, group.us, color=[COLORS[RIVALS[name].family] for name in group.rival], height=0.75)
        for place, row in zip(places, group.itertuples(), strict=True):
            text = f" {microseconds(row.us)} µs, {share(row.floor_us, row.us)}"
            axes.text(row.us, place, text, va="center", fontsize=9)
        floor = group.floor_us.iloc[0]
        axes.axvline(floor, color="black", linestyle="--", linewidth=1.2)
        axes.text(floor, -0.75, "floor ", ha="right", va="center", fontsize=9)
        axes.set(xscale="log", xlim=(floor / 3, group.us.max() * 8), xlabel="µs, share of the floor's speed", title=gpu)
        axes.set_yticks(places, group.rival)
        axes.set_ylim(len(group) - 0.4, -1.2)
        axes.grid(False, axis="y")
    families = dict.fromkeys(RIVALS[name].family for name in rows.rival)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[family]) for family in families]
    panels[0].legend(handles, families, loc="lower right", fontsize=9)
    return finish(figure)


STYLES = {
    ALL_SUMS: (RED, "v", ":"), ORIGINAL: (RED, "o", "-"), OPTIMIZED: (RED, "s", "--"), FACTORED: (ORANGE, "o", "-"),
    COMPILED: (ORANGE, "s", "--"), QUACK: (ORANGE, "^", ":"), FRONTIER: (BLUE, "D", "-"), OMNI: (GREEN, "o", "-"),
}  # fmt: skip


def draw_against(rows, column, label):
    """Time against one size, a line for each rival, and the floor; a panel for every GPU."""
    figure, panels = panel_for_each_gpu(rows, width=7.5, height=5)
    for axes, (gpu, group) in zip(panels, groups(rows, "gpu"), strict=True):
        _draw_lines(axes, group, column, "us")
        floor = group.drop_duplicates(column).sort_values(column)
        axes.plot(floor[column], floor.floor_us, color="black", linestyle="--", linewidth=1.2, label="floor")
        if column == "num_tokens":
            axes.axhline(floor.empty_us.iloc[0], color="grey", linestyle=":", linewidth=1.2, label="empty kernel")
        axes.set(xlabel=label, ylabel="µs", title=gpu)
        axes.legend(fontsize=8)
    return finish(figure)


def draw_memory(rows):
    """The memory a call takes against N; its results are the least it can be."""
    figure, panels = panel_for_each_gpu(rows, width=6.5, height=4.2)
    for axes, (gpu, group) in zip(panels, groups(rows, "gpu"), strict=True):
        _draw_lines(axes, group.assign(mebibytes=group.peak_bytes / 2**20), "num_expert_sqrt", "mebibytes")
        least = group.results_bytes.iloc[0] / 2**20
        axes.axhline(least, color="black", linestyle="--", linewidth=1.2, label="results alone")
        axes.set(xlabel="N", ylabel="MiB at the peak, logits not counted", title=gpu)
        axes.legend(fontsize=8)
    return finish(figure)


def _draw_lines(axes, rows, column, value):
    rows = rows.dropna(subset=value)
    for name in [name for name in STYLES if name in set(rows.rival)]:
        color, marker, line = STYLES[name]
        group = rows[rows.rival == name].sort_values(column)
        axes.plot(group[column], group[value], color=color, marker=marker, linestyle=line, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def draw_roofline(rows):
    """Bytes a second against the values looked at for each byte: the copy is the roof, the diagonals are values a
    second."""
    rows = rows.dropna(subset="us").drop_duplicates(["gpu", "rival", *CASE])
    figure, panels = panel_for_each_gpu(rows, width=7, height=5)
    for axes, (gpu, group) in zip(panels, groups(rows, "gpu"), strict=True):
        for name in [name for name in STYLES if name in set(group.rival)]:
            points = group[group.rival == name]
            case_bytes = np.array([num_bytes(Case(*case)) for case in points[CASE].itertuples(index=False)])
            values = [examined(name, n, k) for n, k in zip(points.num_expert_sqrt, points.k, strict=True)]
            intensity = np.array(values) * points.num_tokens / case_bytes
            color, marker, _ = STYLES[name]
            gigabytes = case_bytes / points.us / 1e3
            axes.scatter(intensity, gigabytes, color=color, marker=marker, s=26, alpha=0.8, label=name)
        roof = group.bandwidth_gbs.median()
        axes.axhline(roof, color="black", linestyle="--", linewidth=1.2, label="copy")
        axes.set(xscale="log", yscale="log", title=gpu, xlabel="logits and sums looked at, for each byte moved",
                 ylabel="GB/s of logits and results")  # fmt: skip
        left, right = axes.get_xlim()
        bottom, top = axes.get_ylim()
        for power in range(8, 16):
            axes.plot([left, right], [10.0 ** (power - 9) / left, 10.0 ** (power - 9) / right], color="0.8", zorder=0)
            if bottom < 10.0 ** (power - 9) / right < top:
                axes.text(right, 10.0 ** (power - 9) / right, f" $10^{{{power}}}$ values/s", fontsize=8, va="center")
        axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return finish(figure)


def draw_guide(rows):
    """Speedup over the original kernels at the guide's sizes, and the range it expects of the optimized ones."""
    figure, panels = panel_for_each_gpu(rows, width=8, height=4.4)
    for axes, (gpu, group) in zip(panels, groups(rows, "gpu"), strict=True):
        labels = []
        for place, ((size, k), case) in enumerate(group.groupby(["num_expert_sqrt", "k"], sort=False)):
            times = case.set_index("rival").us
            low, high = (1 + percent / 100 for percent in GUIDE_EXPECTS[size])
            for offset, name in ((-0.2, OPTIMIZED), (0.2, OMNI)):
                speedup = times[ORIGINAL] / times[name]
                axes.bar(place + offset, speedup, width=0.38, color=STYLES[name][0], label=None if labels else name)
                top = max(speedup, high) if name == OPTIMIZED else speedup
                axes.text(place + offset, 1.03 * top, f"{speedup:.3g}×", ha="center", va="bottom", fontsize=9)
            label = None if labels else "the guide's expectation"
            axes.fill_between([place - 0.42, place + 0.02], low, high, color="black", alpha=0.45, label=label)
            labels.append(f"{size}×{size}\nk = {k}")
        axes.axhline(1, color="black", linewidth=1)
        axes.set(yscale="log", title=gpu, ylabel="times as fast as the original")
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(False, axis="x")
        axes.margins(y=0.15)
        axes.legend(fontsize=8)
    return finish(figure)
