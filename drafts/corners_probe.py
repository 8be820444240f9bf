"""Checks and times variants of plans on a GPU: PYTHONPATH=. python .probe/corners.py [shape ...], a shape being 256,32.

Every variant first routes tokens of several kinds, against the definition (N**2 sums and a stable sort). Then it is
timed in a CUDA graph. The first line of a shape is what the package chooses.
"""

import dataclasses
import pathlib
import sys

import torch

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[1] / "notebooks")]
import timing

from omni_kernels import brute_force_router, factored_router
from omni_kernels.configs import OPTIONS
from omni_kernels.factored import frontier, lanes

T, BF16 = 65536, torch.bfloat16
SHAPES = [(256, 32), (1000, 32), (360, 32), (1024, 32), (256, 64), (256, 128)]
REACH = {(256, 32): 60, (256, 64): 45, (256, 128): 30, (1000, 32): 70, (360, 32): 60}
OLD_US = {(256, 32): 59.5, (256, 64): 110, (256, 128): 204, (1000, 32): 328, (360, 32): 105}


def variants(n, k):
    """Name -> (plan, options of the launch)."""
    if k <= lanes.MAX_EXPERTS_PER_TOKEN:
        base = lanes.plan_of(n, k, BF16, BF16, 16, False, True, 2)
        new = {"chosen": {}, "minima, not sums": {"add_minima": False}, "every 4th a minimum": {"minima": 4},
               "every 2nd a minimum": {"minima": 2}, "2 warps": {"num_warps": 2}}  # fmt: skip
        if base.piled:
            for group, part, piled in ((32, 40, 72), (32, 40, 64), (16, 40, 96), (16, 8, 24), (16, 20, 40), (8, 40, 48)):
                if base.tile_n % part == 0 and part % 8 == 0:
                    new[f"group {group}, part {part}, pile {piled}"] = {"group": group, "part": part, "piled": piled}
            new["normal priority"] = {"priority": "evict_normal"}
            if n == 1000:
                new["as before: one by one"] = {"piled": 0, "part": 0, "tile_n": 0, "staged": False, "vector": 0,
                                                "group": 32, "add_minima": False, "segment": n}  # fmt: skip
                new["tile 40"] = {"tile_n": 40}
            elif n == 360:
                new["as before: tiles of 120"] = {"piled": 0, "part": 0, "group": 32, "add_minima": False}
                new["tiles of 120, sums"] = {"piled": 0, "part": 0, "group": 32}
                new["short pairs"] = {"short_pairs": True}
                new["one tile"] = {"tile_n": 360}
            else:
                new["tile 256, part 32"] = {"tile_n": 256, "part": 32, "piled": 48}
        else:
            for tile, part in ((128, 32), (256, 32), (128, 16)):
                pile = {"looped": False, "chunk": 1, "group": 16, "tile_n": tile, "part": part, "piled": part + 16}
                new[f"pile, tile {tile}, part {part}"] = pile | {"num_warps": 1}
            new["1 warp"] = {"num_warps": 1}
            new["short pairs"] = {"short_pairs": True, "num_warps": 1}
            new["short pairs, every 4th a minimum"] = {"short_pairs": True, "minima": 4, "num_warps": 1}
        options = {"168 registers": 168, "128 registers": 128}
    else:
        base = frontier.plan_of(n, k, BF16, BF16, 16, True)
        new = {"chosen": {}, "as before but for sums": {"sum_bits": 0}, "sums only": {"minima": 0},
               "every 2nd a minimum": {"minima": 2}, "every 8th a minimum": {"minima": 8},
               "every one a minimum": {"minima": 1}, "as before": {"minima": 1, "sum_bits": 0},
               "pieces of 32": {"piece": 32, "pieces": 4}, "8 tokens a warp": {"tokens": 8}}  # fmt: skip
        options = {"168 registers": 168, "128 registers": 128, "200 registers": 200}
    found = {name: (dataclasses.replace(base, **fields), {}) for name, fields in new.items()}
    return found | {name: (base, {"maxnreg": registers}) for name, registers in options.items()}


def logits(n, generator):
    """Tokens of several kinds, in programs of their own and mixed."""
    def normal(rows):
        return torch.randn(rows, n, generator=generator, device="cuda")

    kinds = [
        normal(64), normal(32).mul(4).log_softmax(1), normal(32) + 100, normal(32).round(), normal(32) * 1e-4,
        normal(32).sort(1).values, normal(32).masked_fill(normal(32) > 0, -torch.inf), normal(32) * 10 ** normal(32),
        torch.randint(-3, 4, (32, n), generator=generator, device="cuda") / 8,
        torch.zeros(16, n, device="cuda"), normal(16).masked_fill(normal(16) > 2.5, torch.nan),
    ]  # fmt: skip
    rows = torch.cat(kinds)
    mixed = rows[torch.randperm(len(rows), generator=generator, device="cuda")]
    return torch.cat((rows, mixed, rows)).to(BF16), torch.cat((rows, mixed, mixed)).to(BF16)


def launcher(plan, options, x, y):
    scores = torch.empty((len(x), plan.k), dtype=BF16, device="cuda")
    indices = torch.empty((len(x), plan.k), dtype=torch.int32, device="cuda")

    def call():
        call.binary = plan.kernel[(plan.grid(len(x)),)](
            x, y, scores, indices, None, *x.stride(), *y.stride(), len(x), PLAN=plan, num_warps=plan.num_warps,
            **OPTIONS, **options,
        )  # fmt: skip
        return scores, indices

    return call


def wrong(plan, options, n, generator):
    """How many of the tokens get other experts or scores than by the definition, and by the reference for many more."""
    bad = 0
    small = logits(n, generator)
    want = [brute_force_router(a, b, plan.k) for a, b in zip(small[0].split(64), small[1].split(64), strict=True)]
    want = [torch.cat(part) for part in zip(*want, strict=True)]
    large = [torch.randn(20000, n, generator=generator, device="cuda").to(BF16) for _ in range(2)]
    for (x, y), (scores, experts) in ((small, want), (large, factored_router(*large, plan.k))):
        got, found = launcher(plan, options, x, y)()
        torch.cuda.synchronize()
        same = (got == scores) | (got.isnan() & scores.isnan())
        bad += int((~(same.all(1) & (found == experts).all(1))).sum())
    return bad


def main(shapes):
    copied = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(copied)
    speed = 2 * copied.numel() / timing.kernel_us([lambda: into.copy_(copied)])[0]  # bytes a µs, read and written
    del copied, into
    print(torch.cuda.get_device_name(), f"copies {speed / 1e6:.2f} TB/s, {T} tokens, bf16")
    for n, k in shapes:
        floor = T * (4 * n + 6 * k) / speed
        wanted = f"wanted {REACH[n, k]}%, was {OLD_US[n, k]} µs" if (n, k) in REACH else ""
        print(f"\nN = {n}, k = {k}: floor {floor:.1f} µs; {wanted}")
        generator = torch.Generator("cuda").manual_seed(0)
        copies = timing.num_copies(4 * T * n)
        inputs = [torch.randn(2, T, n, generator=generator, device="cuda").to(BF16) for _ in range(copies)]
        for name, (plan, options) in variants(n, k).items():
            try:
                calls = [launcher(plan, options, *both) for both in inputs]
                us = timing.kernel_us(calls)[0]
                binary = calls[0].binary
                registers = f"{getattr(binary, 'n_regs', '?')} registers, {getattr(binary, 'n_spills', '?')} spills"
                bad = wrong(plan, options, n, generator)
                print(f"  {us:7.1f} µs {100 * floor / us:5.1f}%  {name:34} {registers}  {bad or 'none'} wrong", flush=True)
            except Exception as error:
                print(f"  failed: {name}: {type(error).__name__} {str(error).splitlines()[-1][:90]}", flush=True)


if __name__ == "__main__":
    main([tuple(map(int, shape.split(","))) for shape in sys.argv[1:]] or SHAPES)
