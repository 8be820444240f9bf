"""python .draft/count.py file.py [N k dtype arch]: what a rung compiles to."""
import importlib.util, re, subprocess, sys, tempfile, time
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, mangle_type

def launches(route, *args):
    """The kernels that a call launches, none of which runs."""
    found = []
    def run(self, *args, grid, warmup=False, **kwargs):
        found.append((self, grid, args, kwargs))
    old = JITFunction.run; JITFunction.run = run
    try: route(*args)
    finally: JITFunction.run = old
    return found

def compile_launch(kernel, args, kwargs, arch):
    names = kernel.arg_names
    values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    const = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    const |= {n: v for n, v in values.items() if n not in const and isinstance(v, int) and v == 1}
    sig = {n: "constexpr" if n in const else mangle_type(values[n]) for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in const and (torch.is_tensor(values[n]) or (isinstance(values[n], int) and values[n] % 16 == 0))}
    src = triton.compiler.ASTSource(fn=kernel, signature=sig, constexprs=const, attrs=attrs)
    return triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)

def sass(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary.asm["cubin"]); f.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        r = [subprocess.run([tool, o, f.name], capture_output=True, text=True).stdout for o in ("-res-usage", "-sass")]
    return r

def load(path):
    spec = importlib.util.spec_from_file_location("m", path); m = importlib.util.module_from_spec(spec); sys.modules["m"] = m; spec.loader.exec_module(m); return m

def report(binary, name):
    usage, code = sass(binary)
    ins = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\S+ )?([A-Z0-9_.]+)([^;]*);", code)
    addr = [int(a, 16) for a, *_ in ins]
    loops = [(int(t, 16), a) for (a_, p, op, rest), a in zip(ins, addr) if op.startswith("BRA") for t in re.findall(r"0x([0-9a-f]+)", rest)[-1:] if int(t, 16) < a]
    ends = [a for (a_, p, op, r), a in zip(ins, addr) if op == "EXIT" and not p]
    reg, stack = (re.search(n + r":(\d+)", usage)[1] for n in ("REG", "STACK"))
    count = len([1 for i in ins if i[2] != "NOP"])
    print(f"{name}: registers {reg}, stack {stack}, shared {binary.metadata.shared}, warps {binary.metadata.num_warps}, instructions {count}, loops {[((e-s)//16+1, hex(s)) for s, e in loops]}")
    for st, e in loops:
        body = [op.split(".")[0] for a, (_, _, op, _) in zip(addr, ins) if st <= a <= e]
        print("    loop", len(body), "REDUX", body.count("REDUX"), "SHFL", body.count("SHFL"))
    ops = {}
    for _, _, op, _ in ins: 
        o = op.split(".")[0]; ops[o] = ops.get(o, 0) + 1
    print("   ", {o: n for o, n in sorted(ops.items(), key=lambda x: -x[1])[:24]})
    return code

if __name__ == "__main__":
    path, N, k, dt, arch = (sys.argv[1:] + [None]*5)[:5]
    N, k, dt, arch = int(N or 256), int(k or 16), dt or "bfloat16", int(arch or 90)
    m = load(path)
    dtype = getattr(torch, dt)
    x = torch.zeros(4096, N, dtype=dtype)
    entry = (m.route, x, x, k) if hasattr(m, "route") else (m.gradient, torch.zeros(4096, k, dtype=dtype), torch.zeros(4096, k, dtype=torch.int32), N)
    seen = set()
    for kernel, grid, args, kw in launches(*entry):
        if kernel in seen: continue
        seen.add(kernel)
        t = time.time(); b = compile_launch(kernel, args, kw, arch); t = time.time() - t
        code = report(b, f"{kernel.__name__} sm{arch} {dt} N={N} k={k} triton {triton.__version__} ({t:.1f} s)")
        open(f"/tmp/{kernel.__name__}.sass", "w").write(code)
