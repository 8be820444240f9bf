"""Notebook 02's pictures and tables of what the autotune study has measured."""

import math

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from . import pictures, reports, tables
from .autotune_report import (
    RECORDED_GPU,
    correlations,
    gains,
    lists_of,
    of_gpu,
    paste,
    problems_of,
    recorded_rows,
    regret,
    times_of,
    transfer,
)
from .configurations import KEY, N2_KERNELS, NAMES, Problem, tile_sizes, title
from .pictures import BLUE, GREEN, ORANGE, RED, SCORES

NOTHING = "Nothing of this kind is on record yet."


def _fixed(rows, problems):
    """The GPU, dtype and k that all problems have; of kernels with another k than the first, that too."""
    ks = {problem.kernel: problem.k for problem in reversed(problems)}
    first = ks[problems[0].kernel]
    others = [f"{NAMES[kernel]}: {k}" for kernel, k in ks.items() if k != first]
    return f"{rows['gpu'].iloc[0]}, k = {first}{f' ({others[0]})' if others else ''}, bf16"


def draw_heat_map(rows, problem):
    """Time over the best of the problem, tile against warps, a panel for each number of stages."""
    group = rows[rows["problem"] == problem]
    if group["time_us"].isna().all():
        return None
    relative = group.assign(relative=group["time_us"] / group["time_us"].min())
    tiles = sorted(group["tile"].unique(), key=lambda tile: tuple(tile_sizes(tile).values()))
    names = {tile: " × ".join(map(str, tile_sizes(tile).values())) for tile in tiles}
    stages = sorted(group["num_stages"].unique())
    figure, panels = plt.subplots(
        1, len(stages), figsize=(2.1 * len(stages) + 1.6, 0.27 * len(tiles) + 1.7), sharey=True, squeeze=False
    )
    top = np.log2(relative["relative"].max())
    warps = sorted(group["num_warps"].unique())
    for count, axes in zip(stages, panels[0], strict=True):
        cells = relative[relative["num_stages"] == count].pivot(index="tile", columns="num_warps", values="relative")
        cells = cells.reindex(index=tiles, columns=warps).rename(index=names)
        sns.heatmap(np.log2(cells), ax=axes, cmap="cividis_r", vmin=0, vmax=max(top, 0.1), cbar=False, annot=cells,
                    fmt=".3g", annot_kws={"size": 8}, linewidths=0.5)  # fmt: skip
        axes.set(title=f"{count} stages" if count > 1 else "1 stage", xlabel="warps", ylabel="")
        axes.tick_params(axis="y", labelrotation=0)
        axes.grid(False)
        axes.set_facecolor("0.93")  # not in any list, or it failed
    panels[0][0].set_ylabel(" × ".join(tile_sizes(tiles[0])))
    figure.suptitle(f"{title(problem)}: time / best\n{_fixed(rows, [problem])}", x=0.02, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def draw_distribution(rows):
    """The time of every configuration over the best of its problem, the shorter lists marked."""
    problems = problems_of(rows, N2_KERNELS)
    if not problems:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(problems) + 1.4), layout="constrained")
    marks = {"general": (BLUE, ".", 5), "architecture": (GREEN, "D", 6), "original": (RED, "o", 8)}
    for line, problem in enumerate(problems):
        lists, best = lists_of(rows, problem), min(times_of(rows, problem).values())
        for name, (color, marker, size) in marks.items():
            values = np.array([us for us in lists.get(name, {}).values() if math.isfinite(us)]) / best
            hollow = {} if name == "general" else {"markerfacecolor": "none", "markeredgewidth": 1.4}
            axes.plot(values, np.full(len(values), line), marker, color=color, markersize=size, linestyle="none",
                      label=f"{name} list" if line == 0 else None, **hollow)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(problems)), [title(problem) for problem in problems])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="time / best", title=f"Every configuration that ran\n{_fixed(rows, problems)}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_gains(rows):
    """How much faster than the best of the original list the best of the general one is, in percent, beside what was
    expected; and how fast the best of the architecture's list, which is another scale."""
    table = gains(rows)
    if table.empty:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.36 * len(table) + 1.8), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    places = range(len(table))
    left.axvspan(5, 15, color="0.8")
    left.text(15, -0.7, " the guide's 5 to 15%", fontsize=9, va="center")
    left.axvline(0, color="0.4", linewidth=1.2)
    left.plot(table["general gain %"], places, "o", color=BLUE, markersize=7)
    right.axvline(1, color="0.4", linewidth=1.2)
    right.plot(table["original µs"] / table["architecture µs"], places, "D", color=GREEN, markersize=6)
    for axes, values, form in (
        (left, table["general gain %"], "{:.1f}%"),
        (right, table["original µs"] / table["architecture µs"], "{:.2g}×"),
    ):
        for place, value in enumerate(values):
            if math.isfinite(value):
                side = "right" if axes is right and value > 0.1 else "left"  # where the line at 1 is not
                axes.annotate(form.format(value), (value, place), (-7 if side == "right" else 7, 0), ha=side,
                              textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    left.set(title="General list", xlabel="% faster than the original list's best")
    left.set_xlim(-8, 1.2 * max(20, table["general gain %"].max()))
    right.set(xscale="log", title="Architecture's list", xlabel="speed / original list's best")
    low, high = right.get_xlim()
    right.set_xlim(low / 1.3, 1.5 * max(1, high))
    right.xaxis.set_major_formatter("{x:g}")
    left.set_yticks(places, table.index)
    left.set_ylim(len(table) - 0.4, -1.2)
    problems = problems_of(rows, N2_KERNELS)
    figure.suptitle(f"What other lists are worth\n{_fixed(rows, problems)}", x=0.02, ha="left", weight="bold")
    return figure


def draw_regret(rows, problems):
    """Regret curves: tuning over the general list, what pruning leaves of it, the original and the architecture's."""
    problems = [problem for problem in problems if problem in problems_of(rows)]
    if not problems:
        return None
    figure, panels = plt.subplots(1, len(problems), figsize=(3.2 * len(problems), 4.2), sharey=True, squeeze=False)
    styles = {
        "general": (BLUE, "-", "o"), "pruned": (ORANGE, "-", "^"), "architecture": (GREEN, "--", "D"),
        "original": (RED, ":", "s"), "own": (BLUE, "-", "o"),
    }  # fmt: skip
    for problem, axes in zip(problems, panels[0], strict=True):
        best = min(times_of(rows, problem).values())
        for name, times in lists_of(rows, problem).items():
            curve = regret(times, best)
            color, line, marker = styles[name]
            marked = sorted({0, len(curve) - 1, *(int(tries) for tries in (1, 3, 9, 29, 99) if tries < len(curve))})
            axes.plot(np.arange(1, len(curve) + 1), curve, color=color, linestyle=line, linewidth=1.8,
                      label=f"{name} list", marker=marker, markevery=marked)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=title(problem).replace(", ", "\n", 1), xlabel="configurations tried")
    panels[0][0].set_ylabel("best found / best of all")
    figure.suptitle(_fixed(rows, problems), x=0.02, ha="left", weight="bold")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, frameon=False, loc="lower center", fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def draw_correlations(rows):
    """How well each of the compiler's numbers ranks the configurations."""
    table = correlations(rows)
    if table.empty:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(table) + 1.4))
    sns.heatmap(table.astype(float), ax=axes, cmap="vlag", vmin=-1, vmax=1, annot=True, fmt=".2f", linewidths=0.5,
                cbar=False)  # fmt: skip
    axes.set(ylabel="")
    axes.tick_params(axis="x", labelrotation=0, labelsize=9)
    heading = f"Rank correlation with the measured time\n{_fixed(rows, problems_of(rows))}"
    figure.suptitle(heading, x=0.02, ha="left", weight="bold")
    axes.grid(False)
    axes.set_facecolor("0.93")  # the same for all configurations
    figure.tight_layout()
    return figure


def draw_transfer(rows):
    """A panel for each kernel: the best configuration of one problem used at the others."""
    matrices = {kernel: transfer(rows, kernel) for kernel in NAMES}
    matrices = {kernel: matrix for kernel, matrix in matrices.items() if len(matrix) > 1}
    if not matrices:
        return None
    figure, panels = plt.subplots(2, math.ceil(len(matrices) / 2), figsize=(11, 6.6), squeeze=False)
    for axes in panels.flat[len(matrices) :]:
        axes.remove()
    for (kernel, matrix), axes in zip(matrices.items(), panels.flat, strict=False):
        sns.heatmap(matrix, ax=axes, cmap=SCORES, vmin=1, vmax=2, annot=True, fmt=".2f", cbar=False,
                    linewidths=0.5, annot_kws={"size": 9})  # fmt: skip
        k = next(problem.k for problem in problems_of(rows, [kernel]))
        axes.set(title=f"{NAMES[kernel]}, k = {k}", xlabel="used at tokens, N", ylabel="best of tokens, N")
        axes.tick_params(axis="y", labelrotation=0)
        axes.set_xticks(axes.get_xticks(), [name.replace(", ", "\n") for name in matrix], rotation=0)
    heading = f"Time with another problem's best configuration / best\n{rows['gpu'].iloc[0]}, bf16"
    figure.suptitle(heading, x=0.02, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def draw_two_gpus(here, there):
    """Every configuration on two GPUs, each time over the best of its problem on that GPU."""
    names = [frame["gpu"].iloc[0] for frame in (here, there)]
    columns = []
    for frame in (here, there):
        best = frame.groupby(list(Problem._fields))["time_us"].transform("min")
        columns.append(frame.assign(relative=frame["time_us"] / best)[[*KEY, "relative"]].dropna())
    both = columns[0].merge(columns[1], on=KEY, suffixes=("_here", "_there"))
    figure, axes = plt.subplots(figsize=(6.4, 6))
    styles = zip(sns.color_palette("colorblind"), "os^Dv*", strict=False)
    for (color, marker), (kernel, group) in zip(styles, both.groupby("kernel"), strict=False):
        axes.plot(group["relative_there"], group["relative_here"], marker, color=color, markersize=4, alpha=0.6,
                  label=NAMES[kernel])  # fmt: skip
    axes.axline((1, 1), slope=1, color="0.5", linewidth=1)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log", base=2)
        axis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"time / best, {names[1]}", ylabel=f"time / best, {names[0]}", title="One order on both? bf16")
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def told(make, rows, *args):
    """What `make` makes of recorded rows, a table, as Markdown; columns of nothing are left out."""
    table = make(rows, *args) if len(rows) else rows
    return NOTHING if table.empty else reports.of_frame(table.dropna(axis=1, how="all"))


def show(draw, rows, *args, name):
    """Shows what `draw` draws of recorded rows, a picture that is kept under a name, if there is any."""
    figure = draw(rows, *args) if len(rows) else None
    pictures.save_figure(figure, name) if figure else print(NOTHING)


def draw_here():
    """Draws the GPU at hand beside the recorded one, and prints the lists to paste into configs.py."""
    rows = recorded_rows("autotune")
    here, there = of_gpu(rows, tables.setting()["gpu"]), of_gpu(rows)
    if not len(here) or here["time_us"].isna().all():
        print(f"No times of {tables.setting()['gpu']} are on record.")
        return
    if tables.setting()["gpu"] != RECORDED_GPU:  # whose pictures are there already
        show(draw_distribution, here, name="autotune_here")
        if len(there):
            pictures.save_figure(draw_two_gpus(here, there), "autotune_two_gpus")
    print(paste(here))


# --- what a tuner believes (tuner.py) ---


def _kept(rows):
    """What a tuner keeps by each benchmark on each host: (benchmark, host, the row that it takes for the fastest)."""
    for (name, host), group in rows.groupby(["rival", "host"], sort=False):
        yield name, host, group.loc[group.us.idxmin()]


def tuner_table(rows):
    best = rows.graph_us.min()
    lines = [(f"`{name}`", host, row.tile, row.num_warps, reports.microseconds(row.us),
              reports.microseconds(row.graph_us), reports.number(row.graph_us / best, ".2f"))
             for name, host, row in _kept(rows)]  # fmt: skip
    return reports.markdown(
        ["benchmark", "host", "the tuner keeps", "warps", "believed, µs", "true, µs", "over the best"], lines
    )


def draw_tuner(rows):
    """What benchmarks say of configurations against what CUDA graphs say: a panel for each host, a ring around what a
    tuner keeps."""
    hosts = list(dict.fromkeys(rows.host))
    figure, panels = plt.subplots(1, len(hosts), figsize=(5.2 * len(hosts), 4.2), sharex=True, sharey=True)
    ends = rows.graph_us.min() / 1.3, rows.graph_us.max() * 1.3
    for host, axes in zip(hosts, panels, strict=True):
        here = rows[rows.host == host]
        axes.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
        for (name, group), color, marker in zip(here.groupby("rival", sort=False), (ORANGE, GREEN), "sx", strict=True):
            axes.scatter(group.graph_us, group.us, color=color, marker=marker, s=28, label=name)
        for _, _, row in _kept(here):
            axes.scatter(row.graph_us, row.us, s=160, facecolor="none", edgecolor="black", linewidth=1.2)
        axes.set(xscale="log", yscale="log", title=host, xlabel="µs in a CUDA graph", ylabel="µs by a benchmark")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    panels[0].legend(fontsize=8)
    problem = Problem(*rows[list(Problem._fields)].iloc[0])
    figure.suptitle(f"{rows.gpu.iloc[0]}, {title(problem)}, k = {problem.k}, bf16", x=0.02, ha="left", fontsize=10)
    return pictures.finish(figure)
