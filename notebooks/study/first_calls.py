"""What compiling and tuning cost: first calls in fresh processes, with an empty cache on disk and with a warm one.

Each of the processes runs this module, with a rival and a case, and calls when it is sent a line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from . import rivals, speed, tables, timing
from .binaries import binary_of
from .files import NOTEBOOKS
from .progress import tqdm

CALLS = [
    *((rivals.OMNI, case) for case in (speed.MAIN._replace(num_tokens=16), speed.MAIN, speed.MAIN._replace(k=128),
                                      speed.FP32, speed.FP32._replace(k=32))),
    # Those that compile longest, and the longest rows.
    *((rivals.OMNI, rivals.Case(16, *case)) for case in ((1024, 31, "fp32"), (512, 32, "fp32"), (1000, 31, "fp16"),
                                                       (300, 127, "fp16"), (300, 127, "fp32"), (46340, 64, "fp32"))),
    *((name, rivals.Case(1024, num_expert_sqrt, 16, "bf16")) for num_expert_sqrt in (64, 256)
      for name in (rivals.OPTIMIZED, rivals.ORIGINAL, rivals.PUBLIC)),
]  # fmt: skip
SECONDS = 10  # that a call takes, as a rule, cold and warm
PROGRAM = ["-m", "study.first_calls"]


def measure(again="OMNI_AGAIN" in os.environ):
    """Make the first calls that this GPU has no rows of, with these versions and this commit; all of them with `again`.
    (The time is that of a compiler and of Python code, which no binary tells apart.)

    Returns:
        What was done, in words.
    """
    if not torch.cuda.is_available():
        return "not measured: no GPU here"
    known = tables.of_setting("first_calls", [*tables.SETTING, "commit"])
    known = set() if again else tables.last_keys(known, ["rival", *rivals.CASE, "cache"], [])
    work = [(name, case) for name, case in CALLS if (name, *case, "warm") not in known]
    print(f"{len(work)} first calls, each cold and warm: about {len(work) * SECONDS} s")
    for row in tqdm(rows_of(work), "first calls", 2 * len(work), leave=False):
        tables.append("first_calls", [row])
    return f"{len(work)} measured now, {len(CALLS) - len(work)} before"


def rows_of(work):
    """Yields the rows of some calls: all with an empty cache on disk, then all with what that left there. The processes
    of all calls begin together, and then call one after the other."""
    unknown = dict.fromkeys(["first_s", "other_tokens", "other_s", "later_s", "binary", "error"])
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            processes = [_start(name, case, f"{folder}/{number}") for number, (name, case) in enumerate(work)]
            for process, (name, case) in zip(processes, work, strict=True):
                output, fault = process.communicate(f"{cache}\n")
                if process.returncode == os.EX_IOERR:
                    raise OSError(fault.strip().splitlines()[-1])
                failed = process.returncode != 0
                last = ((fault if failed else output).strip().splitlines() or ["no output"])[-1]
                found = {"error": last[:120]} if failed else json.loads(last)
                yield {"rival": name, **case._asdict(), "cache": cache, **unknown, **found}


def _start(name, case, cache):
    environment = os.environ | {
        "TRITON_CACHE_DIR": cache,
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOKS), *sys.path]),
        "PYTHONUTF8": "1",
    }
    pipes = {**dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE), "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *PROGRAM, name, *map(str, case)], env=environment, **pipes)


def call(name, case):
    """What this process's first call takes, and then a call with another token count: few after many, many after few,
    which the router gives to different kernels, and compiles in the background. With an empty cache the other call
    comes at once (other_s), else when nothing is left to compile (later_s)."""

    def seconds(x, y):
        start = time.perf_counter()
        rivals.RIVALS[name].route(x, y, case.k)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    other_tokens = 16 if case.num_tokens > 1024 else 65536
    some, others = speed.logits(case), speed.logits(case._replace(num_tokens=other_tokens))
    torch.cuda.synchronize()
    cache = input()  # until no other process calls
    found = {"first_s": seconds(*some), "other_tokens": other_tokens}
    if cache == "warm":
        timing.settle()
    found["other_s" if cache == "cold" else "later_s"] = seconds(*others)
    return found | {"binary": binary_of(lambda: rivals.RIVALS[name].route(*some, case.k))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=rivals.RIVALS)
    for size in rivals.CASE[:3]:
        parser.add_argument(size, type=int)
    parser.add_argument("dtype", choices=rivals.DTYPES)
    name, *case = vars(parser.parse_args()).values()
    if not torch.cuda.is_available():
        sys.exit("A first call needs a GPU, and PyTorch finds none here.")
    try:
        print(json.dumps(call(name, rivals.Case(*case))))
    except OSError as error:  # the machine's, not the call's
        print(error, file=sys.stderr)
        sys.exit(os.EX_IOERR)


if __name__ == "__main__":
    main()
