"""What compiling and tuning cost: first calls in fresh processes, with an empty cache on disk and with a warm one.

Each of the processes runs this file, with a rival and a case, and calls when it is sent a line.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import speed_study as speed
import tables
import torch
import triton
from tqdm import tqdm

CALLS = [
    *((speed.OMNI, case) for case in (speed.MAIN._replace(num_tokens=16), speed.MAIN, speed.MAIN._replace(k=128),
                                      speed.FP32, speed.FP32._replace(k=32))),
    # Those that compile longest, and the longest rows.
    *((speed.OMNI, speed.Case(16, *case)) for case in ((1024, 31, "fp32"), (512, 32, "fp32"), (1000, 31, "fp16"),
                                                       (300, 127, "fp16"), (300, 127, "fp32"), (46340, 64, "fp32"))),
    *((name, speed.Case(1024, num_expert_sqrt, 16, "bf16")) for num_expert_sqrt in (64, 256)
      for name in (speed.OPTIMIZED, speed.ORIGINAL, speed.PUBLIC)),
]  # fmt: skip
SECONDS = 10  # that a call takes, as a rule, cold and warm
PROGRAM = pathlib.Path(__file__).resolve()


def measure(again="OMNI_AGAIN" in os.environ):
    """Make the first calls that this GPU has no rows of, with these versions and this source; all of them with `again`.

    Returns:
        What was done, in words.
    """
    if not torch.cuda.is_available():
        return "not measured: no GPU here"
    known = tables.measured_here("first_calls")
    known = known[known.cache == "warm"] if len(known) and not again else known[:0]
    known = set(known[["rival", *speed.CASE]].itertuples(index=False, name=None)) if len(known) else set()
    work = [(name, case) for name, case in CALLS if (name, *case) not in known]
    print(f"{len(work)} first calls, each cold and warm: about {len(work) * SECONDS} s")
    for row in tqdm(rows_of(work), "first calls", 2 * len(work), leave=False):
        tables.append("first_calls", [row])
    return f"{len(work)} measured now, {len(CALLS) - len(work)} before"


def rows_of(work):
    """Yields the rows of some calls: all with an empty cache on disk, then all with what that left there. The processes
    of all calls begin together, and then call one after the other."""
    unknown = dict.fromkeys(["first_s", "other_tokens", "other_s", "other_compiled", "error"])
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            processes = [_start(name, case, f"{folder}/{number}") for number, (name, case) in enumerate(work)]
            for process, (name, case) in zip(processes, work, strict=True):
                output, fault = process.communicate("call\n")
                failed = process.returncode != 0
                last = ((fault if failed else output).strip().splitlines() or ["no output"])[-1]
                found = {"error": last[:120]} if failed else json.loads(last)
                yield {"rival": name, **case._asdict(), "cache": cache, **unknown, **found}


def _start(name, case, cache):
    environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {**dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE), "text": True}
    return subprocess.Popen([sys.executable, PROGRAM, name, *map(str, case)], env=environment, **pipes)


def call(name, case):
    """What this process's first call takes, and then a call with another token count: few after many, many after few,
    which the router gives to different kernels."""

    def seconds(x, y):
        start = time.perf_counter()
        speed.RIVALS[name].route(x, y, case.k)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def num_compiled():
        return len(list(pathlib.Path(triton.knobs.cache.dir).glob("*/*.ttir")))

    other_tokens = 16 if case.num_tokens > 1024 else 65536
    some, others = speed.logits(case), speed.logits(case._replace(num_tokens=other_tokens))
    torch.cuda.synchronize()
    input()  # until no other process calls
    first = seconds(*some)
    compiled = num_compiled()
    found = {"first_s": first, "other_tokens": other_tokens, "other_s": seconds(*others)}
    return found | {"other_compiled": num_compiled() - compiled}


def table(rows):
    """First calls of one GPU with an empty and with a warm cache on disk, and what another token count costs after the
    first of them, when nothing but that call's kernels is there."""
    lines = []
    for (name, *case), group in rows.groupby(["rival", *speed.CASE], sort=False):
        by_cache = group.set_index("cache")
        first, warm = by_cache.loc["cold"], by_cache.first_s.get("warm", math.nan)
        if isinstance(first.error, str):
            lines.append((name, *case, first.error, *"–" * 4))
            continue
        other = (
            speed.number(first.other_tokens, ".0f"),
            _duration(first.other_s),
            speed.number(first.other_compiled, ".0f"),
        )
        lines.append((name, *case, _duration(first.first_s), _duration(warm), *other))
    return speed.markdown(["rival", "tokens", "N", "k", "dtype", "empty cache", "warm cache", "then with tokens",
                           "it took", "kernels it compiled"], lines)  # fmt: skip


def _duration(seconds):
    if math.isnan(seconds):
        return "–"
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.3g} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=speed.RIVALS)
    for size in speed.CASE[:3]:
        parser.add_argument(size, type=int)
    parser.add_argument("dtype", choices=speed.DTYPES)
    name, *case = vars(parser.parse_args()).values()
    if not torch.cuda.is_available():
        sys.exit("A first call needs a GPU, and PyTorch finds none here.")
    print(json.dumps(call(name, speed.Case(*case))))


if __name__ == "__main__":
    main()
