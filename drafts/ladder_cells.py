"""The ladder's section of notebook 03, cell by cell: CELLS is a list of (kind, source). `python .draft/cells.py` runs the
code cells in order (from the repository's root, with PYTHONPATH=.:notebooks), to see that they work."""

CELLS = []


def markdown(text):
    CELLS.append(("markdown", text.strip("\n")))


def code(text):
    assert len(text.strip("\n").splitlines()) < 25
    CELLS.append(("code", text.strip("\n")))


markdown(r"""
## From 62 ms, one idea at a time

The first rungs of the ladder are kernels to read. Each is a file of `notebooks/ladder/` of at most 120 lines that stands
alone: why, a kernel, a wrapper. Copy one, call its `route(x, y, k)`, change it. Here are the lines that are new in each, what
they should gain by arithmetic, what they gained, and what a profiler says where the two differ.

The arithmetic is that of a machine with two limits. Memory moves bytes at the speed of a copy. And a multiprocessor starts
four warp instructions a cycle at most: one instruction, 32 lanes. Whatever takes more than the longer of the two times waits for
something else. The instructions of a rung are those that the compiler made of it for an H100, loops counted as
often as they run.
""")
code(r"""
import ladder.rung1_all_sums as all_sums
import ladder.rung2_one_kernel as one_kernel
import ladder.rung3_staircase as staircase
import ladder.rung4_packed_keys as packed_keys
import ladder.rung5_chunk_maxima as chunk_maxima
import ladder.rung6_row_a_lane as row_a_lane
import tables
from pictures import draw_network, draw_owners, excerpt
from routing_study import save_figure

N, K, TOKENS = 256, 16, 65536
BYTES_A_US = 3.0e6  # of a copy on an H100
INSTRUCTIONS_A_US = 132 * 4 * 1755  # multiprocessors, schedulers of each, cycles: what an H100 can issue
""")
code(r"""
def latest(table, rung, **case):
    rows = tables.read(table)
    for column, value in {"rung": rung, **case}.items() if len(rows) else ():
        rows = rows[rows[column] == value]
    return None if rows.empty else rows.iloc[-1]


def measured(rung, num_tokens=TOKENS, num_expert_sqrt=N, k=K, dtype="bfloat16"):
    return latest("rungs", rung, num_tokens=num_tokens, num_expert_sqrt=num_expert_sqrt, k=k, dtype=dtype)


def told(rung, predicted_us, before=None, **case):
    row, last = measured(rung, **case), before and measured(before, **case)
    print(f"by arithmetic {predicted_us:,.0f} µs", end="")
    if row is None:
        return print(", not measured yet")
    print(f", measured {row.us:,.4g} µs, {row.us / predicted_us:.2g} times that, on {row.gpu}; result {row.check}", end="")
    print("" if last is None else f"; {last.us / row.us:.3g} times as fast as the rung before")


def profiled(rung):
    row = latest("profile", rung)
    print("not profiled yet" if row is None else f"issue slots busy {row.issue_busy_percent:.0f}%, memory "
          f"{row.dram_percent:.0f}%, {row.registers:.0f} registers, waiting for: {row.stalls}")
""")

# --- rung 1 ---
markdown(r"""
### Rung 1: all sums

*What is the most obvious program?* Write all $N^2$ sums to memory; then look for the largest, $k$ times. What has been found is
overwritten with NaN, which wins no comparison. A program has one token; every thread keeps the best of every 1024th sum.
""")
code(r"""
display(excerpt(all_sums, "round_kernel"))
""")
markdown(r"""
By arithmetic: 4 bytes a sum, written once and read $k$ times.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("rung1_all_sums", TOKENS * N * N * 4 * (1 + K) / BYTES_A_US)
profiled("rung1_all_sums")
""")
markdown(r"""
<!-- WHY: written when measured. Expected: memory near 100%, so arithmetic is right. PyTorch's topk (62 ms) reads the sums fewer than
16 times, in radix passes. -->
Memory is all it waits for, and nearly all of what it moves is sums that nobody wanted.
""")

# --- rung 2 ---
markdown(r"""
### Rung 2: one kernel

*Why store what is so cheap to make again?* Each of the $k$ rounds adds all pairs anew, and takes the best that comes after the last
one in the order of falling sums and rising experts. So nothing has to be marked as taken.
""")
code(r"""
display(excerpt(one_kernel, "rounds_kernel", 6, 29))
""")
markdown(r"""
By arithmetic: the compiler makes 250 instructions of a tile of $8 \times 256$ sums, for each of 4 warps; $N / 8$ tiles a round,
$k$ rounds.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("rung2_one_kernel", TOKENS * K * N / 8 * 4 * 250 / INSTRUCTIONS_A_US, before="rung1_all_sums")
profiled("rung2_one_kernel")
""")
markdown(r"""
<!-- WHY: expected: issue slots busy 70 to 90%; the two reductions at the end of a round go through shared memory and barriers. -->
Memory is idle now. The sixteen instructions a sum are the price, and no tuning of tiles changes the number of sums. (The public
kernels keep their sums in registers and take them out one by one; the same order of time.)
""")

# --- rung 3 ---
markdown(r"""
### Rung 3: the staircase

*Which sums can win?* With both factors sorted, the pair of ranks $(a, b)$ is beaten by $a \cdot b - 1$ others: only
$a \cdot b \le k$ is left. The ranks of these pairs are counted out once, in a loop of $k$ steps over all places at a time:
""")
code(r"""
display(excerpt(staircase, "staircase"))
""")
markdown(r"""
Sorting is by rounds still, now of $N$ values: a reduction for the largest, another for the first place that has it, and a note of
what has been taken. The same function takes the best of the sums.
""")
code(r"""
display(excerpt(staircase, "best_first"))
""")
markdown(r"""
By arithmetic: 16 rounds of 73 instructions for each factor, 16 of 28 for the sums, and 170 to make the pairs and store them.
A warp has a token, so these are warp instructions a token.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("rung3_staircase", TOKENS * (2 * K * 73 + K * 28 + 170) / INSTRUCTIONS_A_US, before="rung2_one_kernel")
profiled("rung3_staircase")
""")
markdown(r"""
<!-- WHY: expected: slower than arithmetic by 1.2 to 1.6: each round is a chain of 5 shuffles and a REDUX, and 32 warps a multiprocessor
(programs of one warp: 32 at most) do not hide all of it: stall short_scoreboard. -->
""")

# --- rung 4 ---
markdown(r"""
### Rung 4: packed keys

*Why two reductions for one place?* A float's bits, with a negative number's magnitude flipped, order as an integer as floats do. With
the column below them, counted backwards, one integer says both, and the largest is the right one among equals too. The last 16 bits
of a bf16 logit, as fp32, are zeros: there is room in 32 bits.
""")
code(r"""
display(excerpt(packed_keys, "to_keys"))
display(excerpt(packed_keys, "best_first"))
""")
markdown(r"""
No two keys are equal, so the next best is the largest below the last one: no note of what has been taken. And the maximum of
32-bit integers over a warp is one instruction, REDUX. By arithmetic: in all 1200 warp instructions a token instead of 2950.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("rung4_packed_keys", TOKENS * 1200 / INSTRUCTIONS_A_US, before="rung3_staircase")
profiled("rung4_packed_keys")
""")
markdown(r"""
<!-- WHY: Triton 3.6 reduces 64-bit keys (pairs) by shuffles, 3.9 by two REDUX: 1700 against 1200 instructions. -->
""")

# --- rung 5 ---
markdown(r"""
### Rung 5: chunk maxima

*Must every round look at every key?* The $k$ best of a row lie in the $k$ chunks with the largest maxima. So the rounds look at
maxima first, then at the keys of the $k$ best chunks.
""")
code(r"""
display(excerpt(chunk_maxima, "best_of_row"))
""")
markdown(r"""
By arithmetic this is worth nothing here: of $N = 256$ a lane has 2 + 2 keys to compare instead of 8, but every round costs its
reduction too, and there are twice as many rounds. Where rows are longer it pays: of $N = 1024$ 4 + 4 keys instead of 32, 1800
warp instructions a token instead of 3300.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("rung5_chunk_maxima", TOKENS * 1150 / INSTRUCTIONS_A_US, before="rung4_packed_keys")
told("rung5_chunk_maxima", TOKENS * 1800 / INSTRUCTIONS_A_US, before="rung4_packed_keys", num_expert_sqrt=1024)
profiled("rung5_chunk_maxima")
""")
markdown(r"""
<!-- WHY: expected as predicted; a second trip to the cache is a latency of its own. The shipped warp kernel gained 1.09 times. -->
An idea is worth what the ideas before it leave: where keys were compared by sorting networks over lanes, it would gain more.
""")

# --- rung 6 ---
markdown(r"""
### Rung 6: a row a lane

*What are the 32 lanes of a warp talking about?* Up to here they share a row, and every maximum is one over all of them. Now each
lane has a token of its own, and what was parallel inside a token is parallel across tokens.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
save_figure(draw_owners(), "ladder_owners")
""")
markdown(r"""
A lane's keys are in registers, and registers have no index. So a lane sorts by a *network*: comparators whose places do not hang on
the keys. Here is the one that sorts 16 keys in the shipped kernel, drawn from the list that the kernel is made of (Batcher's; the rung
has a bitonic one, 80 comparators, which takes fewer lines to write):
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
save_figure(draw_network("sort", 16), "network_sort")
save_figure(draw_network("merge best", 32, 16), "network_merge")
""")
code(r"""
display(excerpt(row_a_lane, "bitonic"))
display(excerpt(row_a_lane, "sort"))
display(excerpt(row_a_lane, "best_of_row"))
""")
markdown(r"""
A key is a tensor of 32 numbers, one for each lane, and a tuple of such tensors a list; Triton unrolls the recursion, and of the
lower half that nobody asks for nothing is left. By arithmetic: 400 instructions for 16 more keys, 16 times a row, two rows, and 3900 for
the 50 pairs, whose keys have 64 bits. But a warp has 32 tokens at once.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
warp = 2 * N / K * 400 + 3900
told("rung6_row_a_lane", TOKENS / 32 * warp / INSTRUCTIONS_A_US, before="rung5_chunk_maxima")
profiled("rung6_row_a_lane")
for rung in ("rung5_chunk_maxima", "rung6_row_a_lane"):
    row = measured(rung, num_tokens=1024)
    print(f"1024 tokens, {rung}: {'not measured yet' if row is None else f'{row.us:.3g} µs'}")
""")
markdown(r"""
<!-- WHY: expected 1.4 to 2 times the arithmetic: 16-byte loads of 32 different rows (long_scoreboard, lg_throttle), 4766 instructions of
straight code (no_instruction), 2-byte stores 32 bytes apart. And 1024 tokens lose: 32 warps for 528 schedulers. -->
Few tokens lose: 1024 of them are 32 warps, and an H100 has 528 schedulers. The shipped kernel has both ends: 16 lanes a token for few
tokens, two for many. And a network's code grows faster than its keys: of $k = 64$ Triton makes the rung in more than four minutes. The
shipped kernel hands its compiler whole networks in PTX, and from $k = 33$ on takes another way.

### And on: the shipped kernel

From here on the rungs are the shipped kernel itself, with ideas of its plan switched off (two lanes a token instead of one): loads through
shared memory in whole cache lines, the chunk maxima again, keys as doubles, short keys of pairs, loops, minima by sums.
""")

# --- notebook 04: the gradient, in the same manner (it takes told, profiled and excerpt from above) ---
markdown(r"""
### The gradient, rung 1: atomics

*Pairs of a token share rows: who adds them up?* The obvious kernel lets the memory do it, in the order in which they arrive, which is
another one on every run.
""")
code(r"""
import ladder.backward1_atomics as atomics
import ladder.backward2_compare_and_store as compare_and_store

display(excerpt(atomics, "atomics_kernel"))
""")
markdown(r"""
By arithmetic: fp32 sums are cleared, read again and written rounded, $2 N (4 + 4 + 2)$ bytes a token, besides the additions.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("backward1_atomics", TOKENS * 2 * N * (4 + 4 + 2) / BYTES_A_US)
profiled("backward1_atomics")
""")
markdown(r"""
### The gradient, rung 2: compare and store

*Can pairs that share a row agree without meeting?* Each looks through the $k$ pairs of its token, in order, and sums those of its row.
All of them make the same sum, to the bit, so all may store it.
""")
code(r"""
display(excerpt(compare_and_store, "store_kernel", 6, 33))
""")
markdown(r"""
By arithmetic: rows are written once, in 16 bits, and gradients and experts read; two instructions for each of $2 k^2$ comparisons are
no more than a tenth of that time.
""")
code(r"""
# NBVAL_IGNORE_OUTPUT
told("backward2_compare_and_store", TOKENS * (2 * N * 2 + K * (2 + 4)) / BYTES_A_US, before="backward1_atomics")
profiled("backward2_compare_and_store")
""")
markdown(r"""
<!-- WHY: expected 1.7 times the arithmetic (the prototype took 43 µs where the floor is 24): 2-byte stores to scattered rows touch whole sectors,
after the zeros went there already, and a program waits at its barrier. -->
""")


def run():
    import os

    os.environ.setdefault("TRITON_INTERPRET", "1")
    import matplotlib

    matplotlib.use("Agg")
    scope = {"display": lambda shown: print(shown.data if hasattr(shown, "data") else shown)}
    for kind, source in CELLS:
        if kind == "code":
            exec(source, scope)


if __name__ == "__main__":
    run()
