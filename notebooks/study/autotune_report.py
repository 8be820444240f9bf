"""What the tables of the autotune study say: what lists of configurations are worth, and how well one can predict."""

import math

import numpy as np
import pandas as pd

from omni_kernels import configs

from . import tables
from .compiling import with_occupancy
from .configurations import (
    KEY,
    N2_KERNELS,
    NAMES,
    PROBLEMS,
    Problem,
    kept_by_pruning,
    label,
    space,
    tile_sizes,
    title,
    tokens_of,
)

RECORDED_GPU = "NVIDIA H100 80GB HBM3"
PREDICTORS = ["registers", "spills", "shared", "instructions", "occupancy", "prediction"]


def recorded_rows(table):
    """The rows of a table, of every GPU: where a GPU was measured under several Tritons, those of the one with the most
    rows, the latest of equals, so that no two are mixed; of rows of one configuration the last."""
    rows = tables.read(table)
    if not len(rows):
        return rows
    rows = rows.drop_duplicates(["gpu", "triton", *KEY], keep="last")
    groups = [group for _, group in rows.groupby(["gpu", "triton"])]
    groups.sort(key=lambda group: (len(group), group.index.max()))
    return pd.concat({group["gpu"].iloc[0]: group for group in groups}.values(), ignore_index=True)


def of_gpu(rows, gpu=RECORDED_GPU):
    """The rows of a GPU, with the occupancy and the time predicted from what the compiler said; none if none are."""
    if not len(rows) or gpu not in set(rows["gpu"]):
        return pd.DataFrame()
    rows = rows[rows["gpu"] == gpu].reset_index(drop=True)
    measured = ["time_us", "low_us", "high_us", "error", "chosen"]
    measured += ["registers", "spills", "shared", "instructions", "binary"]
    rows = with_occupancy(rows.reindex(columns=list(dict.fromkeys([*rows, *measured]))))
    return rows.assign(
        problem=[Problem(*values) for values in rows[list(Problem._fields)].itertuples(index=False, name=None)],
        config=list(rows[KEY[4:]].itertuples(index=False, name=None)),
        prediction=[prediction(row) for row in rows.itertuples()],
    )


def prediction(row):
    """Cycles a launch should take: waves of programs, times the instructions of each, issued by four schedulers."""
    if math.isnan(row.instructions) or not row.occupancy:
        return math.nan
    programs = math.ceil(row.tokens / tokens_of(tile_sizes(row.tile), row.num_warps))
    resident = min(row.occupancy, math.ceil(programs / row.multiprocessors))
    waves = math.ceil(programs / (row.multiprocessors * row.occupancy))
    latency = 6  # cycles from an instruction to one that needs it, where no other warp fills them
    return waves * rounds(row) * row.instructions * max(latency, resident * row.num_warps / 4)


def rounds(row):
    """How often a program should run through most of its code."""
    sizes = tile_sizes(row.tile)
    if row.kernel == "fwd":
        return sizes["TILE_M"]
    if row.kernel == "fwd_split":
        # Once for each tile and once for each expert that is among the best so far: of the experts of the j-th tile, in
        # random order, k / j are.
        tiles = math.ceil(row.num_expert_sqrt**2 / sizes["TILE_N"])
        return sizes["TILE_M"] * (tiles + row.k * sum(1 / tile for tile in range(1, tiles + 1)))
    if row.kernel == "bwd":
        return math.ceil(row.k / sizes["TILE_K"])
    if row.kernel == "frontier":
        return math.ceil(row.num_expert_sqrt / sizes["PIECE"])  # networks; the loop that pops the pairs is short
    return 1


def spearman(a, b):
    """The rank correlation of two columns, over the rows that have both."""
    both = pd.DataFrame({"a": a, "b": b}).dropna()
    return both["a"].rank().corr(both["b"].rank()) if len(both) > 2 else math.nan


def times_of(rows, problem, wanted=None):
    """{configuration: µs} of a problem; of the wanted configurations alone, where given. A failed one takes forever."""
    rows = rows[rows["problem"] == problem]
    times = dict(zip(rows["config"], rows["time_us"].fillna(math.inf), strict=True))
    return times if wanted is None else {label(c): times[label(c)] for c in wanted if label(c) in times}


def lists_of(rows, problem):
    """The lists one could tune a problem over, as {name: {configuration: µs}}: original, general, the architecture's,
    and what pruning leaves of the general one."""
    if problem.kernel not in N2_KERNELS:
        return {"own": times_of(rows, problem)}
    arch = rows["arch"].iloc[0]
    names = {"original": "original", "general": "general"}
    names |= {"architecture": arch} if arch in configs.ARCH_SPACES else {}
    wanted = {name: space(problem.kernel, where) for name, where in names.items()}
    wanted["pruned"] = kept_by_pruning(problem, wanted["general"])
    return {name: times_of(rows, problem, candidates) for name, candidates in wanted.items()}


def gains(rows):
    """For each problem of the N² kernels: the best time of each list, in µs, and how many percent faster the longer
    and the architecture's list are than the original one, and the latter than the general one."""
    found = []
    gained = ["general gain %", "architecture gain %", "architecture over general %"]
    names = ["problem", "original µs", "general µs", "architecture µs", "pruned µs", *gained]
    for problem in problems_of(rows, N2_KERNELS):
        best = {f"{name} µs": min(times.values(), default=math.nan) for name, times in lists_of(rows, problem).items()}
        row = {"problem": title(problem), "architecture µs": math.nan, **best}
        row["general gain %"] = 100 * (row["original µs"] / row["general µs"] - 1)
        row["architecture gain %"] = 100 * (row["original µs"] / row["architecture µs"] - 1)
        row["architecture over general %"] = 100 * (row["general µs"] / row["architecture µs"] - 1)
        found.append(row)
    return pd.DataFrame(found, columns=names).set_index("problem").replace(math.inf, math.nan)


def choices(rows):
    """For each problem of the N² kernels: the best configuration and the best of the architecture's list, what the
    latter costs over the former, and the programs each launches."""
    found = []
    names = [f"{name}{what}" for name in ("best", "architecture") for what in ("", " programs", " µs")]
    for problem in problems_of(rows, N2_KERNELS):
        row = {"problem": title(problem)}
        lists = lists_of(rows, problem)
        for name, times in (("best", times_of(rows, problem)), ("architecture", lists.get("architecture", {}))):
            if times and math.isfinite(min(times.values())):
                config = min(times, key=times.get)
                programs = math.ceil(problem.tokens / tokens_of(tile_sizes(config[0]), config[1]))
                row |= {name: short(config), f"{name} programs": programs, f"{name} µs": times[config]}
        found.append(row)
    frame = pd.DataFrame(found, columns=["problem", *names]).set_index("problem")
    return frame.assign(**{"time / best": frame["architecture µs"] / frame["best µs"]})


def rules(rows):
    """For each problem of the factored kernels: the best configuration, the one that their rules choose, and what that
    costs over the best."""
    found = []
    for problem in problems_of(rows, [kernel for kernel in NAMES if kernel not in N2_KERNELS]):
        times = times_of(rows, problem)
        best = min(times, key=times.get)
        ours = rows[(rows["problem"] == problem) & rows["chosen"].eq(True)]
        row = {"problem": title(problem), "best": short(best), "chosen": "–", "time / best": math.nan}
        if len(ours):
            row |= {"chosen": short(ours["config"].iloc[0]), "time / best": ours["time_us"].iloc[0] / times[best]}
        found.append(row)
    return pd.DataFrame(found, columns=["problem", "best", "chosen", "time / best"]).set_index("problem")


def measured_list(rows):
    """For each problem: how long the architecture's measured list is, and the best of it over the best of all. Times of
    one binary count as one."""
    name, found = f"{rows['arch'].iloc[0]}:measured", []
    for problem in problems_of(rows) if name in configs.SPACES else ():
        group = rows[rows["problem"] == problem]
        listed = group["config"].isin([label(config) for config in configs.get_configs(name, problem.kernel)])
        best = group["time_us"][group["binary"].isin(group["binary"][listed])].min()
        found.append({"problem": title(problem), "configurations": listed.sum(), "of": len(group),
                      "time / best": best / group["time_us"].min()})  # fmt: skip
    return pd.DataFrame(found, columns=["problem", "configurations", "of", "time / best"]).set_index("problem")


def _by_kernel(table, how):
    """A table of problems as one of kernels: how many problems a kernel has, and what they have together, by column."""
    groups = table.groupby(table.index.str.rsplit(", ", n=2).str[0].rename("kernel"), sort=False)
    return pd.concat([groups.size().rename("problems"), groups.agg(how)], axis=1)


def measured_by_kernel(rows):
    """measured_list, a row for each kernel, with what the list costs in the worst of its problems."""
    table = _by_kernel(measured_list(rows), {"configurations": "max", "of": "max", "time / best": "max"})
    return table.rename(columns={"time / best": "time / best, at worst"})


def rule_by_kernel(rows):
    """prediction_rule, a row for each kernel: its problems' binaries together, and what the rule costs in the worst."""
    table = _by_kernel(prediction_rule(rows), {"binaries": "sum", "kept": "sum", "best kept / best": "max"})
    return table.rename(columns={"best kept / best": "best kept / best, at worst"})


def problems_of(rows, kernels=tuple(NAMES)):
    """The problems in which something was timed, in the order of PROBLEMS."""
    timed = set(rows.dropna(subset="time_us")["problem"])
    return [problem for problem in PROBLEMS if problem in timed and problem.kernel in kernels]


def short(config):
    """A configuration in a few characters: tile, warps, stages."""
    tile, warps, stages = config
    return f"{' × '.join(map(str, tile_sizes(tile).values()))}, {warps} warps, {stages} stages"


def noise(rows):
    """How far times of one binary in one problem lie apart: the largest over the smallest, for each measured twice."""
    times = rows.dropna(subset="time_us").groupby([*Problem._fields, "binary"])["time_us"]
    return (times.max() / times.min())[times.size() > 1]


def noise_table(rows):
    """The quantiles of the noise, in percent, by kernel."""
    percent = 100 * (noise(rows) - 1)
    return percent.groupby("kernel").quantile([0.5, 0.9]).unstack().rename(columns="{:.0%} of the binaries, %".format)


def regret(times, best, tries=400):
    """The best found after 1, 2, 3... tries over the best there is: the median of many random orders."""
    values = np.array(list(times.values()), dtype=float)
    orders = np.random.default_rng(0).permuted(np.tile(values, (tries, 1)), axis=1)
    return np.median(np.minimum.accumulate(orders, axis=1), axis=0) / best


def tries_table(rows, within=1.05):
    """The tries in random order after which tuning is, as a rule, within 5% of the best, or "never"; of how many."""
    found = []
    for problem in problems_of(rows):
        best = min(times_of(rows, problem).values())
        row = {"problem": title(problem)}
        for name, times in lists_of(rows, problem).items():
            close = np.flatnonzero(regret(times, best) <= within)
            row[f"{name}, tries"] = f"{close[0] + 1 if len(close) else 'never'} of {len(times)}"
        found.append(row)
    return pd.DataFrame(found, columns=None if found else ["problem"]).set_index("problem")


def compiled_rows():
    """What the compiler said last, of the Triton it was asked for most, with predicted occupancy."""
    rows = tables.read("compiled")
    if not len(rows):
        return rows
    rows = rows.drop_duplicates(["triton", "arch", *KEY], keep="last")
    groups = [group for _, group in rows.groupby("triton", sort=False)]
    return with_occupancy(max(groups, key=len).reset_index(drop=True))


def resources_table(rows):
    """What the compiler said of each binary, a row each."""
    names = {
        "registers": "registers a thread",
        "spills": "spilled, bytes a thread",
        "shared": "shared, bytes a program",
        "instructions": "instructions",
        "occupancy": "programs a multiprocessor holds",
    }
    first = rows.drop_duplicates("binary").set_index(["kernel", "tile", "num_warps", "arch"]).sort_index()
    return first[list(names)].rename(columns=names).rename_axis(index={"num_warps": "warps", "arch": "architecture"})


def compiled_table(rows, archs=None):
    """For each kernel and architecture: configurations asked for, failed, spilling; distinct binaries, occupancy. Of
    all architectures, or of some."""
    rows = rows if archs is None else rows[rows["arch"].isin(archs)]
    groups = rows.assign(
        failed=rows["registers"].isna(),
        spilling=rows["spills"] > 0,
        config=rows["tile"] + rows["num_warps"].astype(str),
    ).groupby(["kernel", "arch"])
    return pd.DataFrame(
        {
            "configurations": groups.size(),
            "failed": groups["failed"].sum(),
            "spilling": groups["spilling"].sum(),
            "tile × warps": groups["config"].nunique(),
            "binaries": groups["binary"].nunique(),
            "registers a thread, median": groups["registers"].median(),
            "programs a multiprocessor holds, median": groups["occupancy"].median(),
        }
    )


def correlations(rows):
    """The rank correlation of each predictor with the measured time, for each problem."""
    timed = rows.dropna(subset="time_us")
    return pd.DataFrame(
        {
            title(problem): {
                name: spearman(group[name], group["time_us"]) for name in PREDICTORS if group[name].nunique() > 1
            }
            for problem in problems_of(rows)
            for group in [timed[timed["problem"] == problem]]
        }
    ).T.reindex(columns=PREDICTORS)


def prediction_rule(rows, within=2.0):
    """For each problem: how many binaries a tuner times that skips those predicted slower than `within` times the
    best prediction, and the best of them over the best of all."""
    found = []
    for problem in problems_of(rows):
        group = rows[(rows["problem"] == problem)].dropna(subset=["time_us", "prediction"]).drop_duplicates("binary")
        kept = group[group["prediction"] <= within * group["prediction"].min()]
        found.append({"problem": title(problem), "binaries": len(group), "kept": len(kept),
                      "best kept / best": kept["time_us"].min() / group["time_us"].min()})  # fmt: skip
    return pd.DataFrame(found, columns=["problem", "binaries", "kept", "best kept / best"]).set_index("problem")


def transfer(rows, kernel):
    """What the best configuration of one problem (row) costs at another (column), over the best there."""
    problems = problems_of(rows, (kernel,))
    times = {problem: times_of(rows, problem) for problem in problems}
    best = {problem: min(times[problem], key=times[problem].get) for problem in problems}
    names = [f"{p.tokens}, {p.num_expert_sqrt}" for p in problems]
    loss = [[times[at].get(best[of], math.nan) / times[at][best[at]] for at in problems] for of in problems]
    return pd.DataFrame(loss, names, names).replace(math.inf, math.nan)


def paste(rows, within=1.02):
    """The lists to paste into configs.py: few values that hold, for every problem, one within 2% of its best."""
    lines = ["MEASURED_SPACE = {"]
    for kernel in dict.fromkeys(problem.kernel for problem in problems_of(rows)):
        good = {}
        for problem in problems_of(rows, (kernel,)):
            times = times_of(rows, problem)
            limit = within * min(times.values())
            for tile, warps, _ in (config for config, us in times.items() if us <= limit):
                first = min(stages for *other, stages in times if other == [tile, warps])
                good.setdefault((tile, warps, first), set()).add(problem)
        chosen, missing = [], set().union(*good.values())
        while missing:
            config = max(sorted(good), key=lambda config: len(good[config] & missing))
            chosen.append(config)
            missing -= good[config]
        values = [[*tile_sizes(tile).values(), warps, stages] for tile, warps, stages in chosen]
        lists = ", ".join(str(sorted(set(column))) for column in zip(*values, strict=True))
        lines.append(f'    "{kernel}": ({lists}),')
    return "\n".join([*lines, "}"])
