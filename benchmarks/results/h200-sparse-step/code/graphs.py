# fmt: off
"""Times without Python: python graphs.py ffn | step SECONDS. Every call is a CUDA graph's replay.

`ffn`: one FFN layer forward and backward, dense (eager, compiled) and compact, and the parts of compact.
`step`: a whole training step (forward, backward, AdamW), plain compiled decoder and compact ones.
"""
import json, os, statistics, sys, time
HERE = os.path.dirname(os.path.abspath(__file__)); sys.path[:0] = [HERE, os.path.join(HERE, "base")]
import torch, torch.nn.functional as F
from peer import Model, SHAPES
import compact_ffn as cf
OUT = os.environ.get("OUT", "results")

def put(name, **kw):
    with open(f"{OUT}/graphs.jsonl", "a") as f: f.write(json.dumps({"name": name, **kw}) + "\n")

def times(calls, rounds=7, warm=2):
    got = [[] for _ in calls]
    for r in range(rounds + warm):
        for i, c in enumerate(calls):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); c(); b.record(); b.synchronize()
            if r >= warm: got[i].append(a.elapsed_time(b))
    return [statistics.median(g) for g in got]

def graphed(call, warm=2):
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm): call()
    torch.cuda.current_stream().wait_stream(side); torch.cuda.synchronize(); torch.cuda.empty_cache()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): call()
    return g

def similar_tokens(T, D, groups=64):
    c = torch.randn(groups, D, device="cuda")
    p = 1 / torch.arange(1, groups + 1, device="cuda").float() ** 0.5
    return (0.5 * c[torch.multinomial(p, T, replacement=True)] + torch.randn(T, D, device="cuda")).bfloat16()

def dense_fn(x, up, down): return (x @ up.T).relu() @ down

def ffn():
    E = 256; cd = torch.compile(dense_fn, dynamic=False)
    for name, D, Fn, T in (("gpt-124m", 768, 6144, 65536), ("gpt-350m", 1024, 8192, 65536), ("wide", 2048, 16384, 32768), ("gpt-50m", 384, 6144, 65536)):
        S = Fn // E; torch.manual_seed(0)
        x = similar_tokens(T, D); dy = torch.randn(T, D, device="cuda").bfloat16()
        up = torch.randn(Fn, D, device="cuda") / D**.5; down = (torch.randn(Fn, D, device="cuda") / Fn**.5).bfloat16()
        router = F.normalize(F.normalize(up, dim=1).view(E, S, D).mean(1), dim=1).bfloat16(); up = up.bfloat16()
        leaves = [t.requires_grad_() for t in (x, up, down)]
        step = lambda f: (lambda: torch.autograd.grad(f(*leaves), leaves, dy))
        with torch.no_grad():
            scores = x @ router.T
            theta = torch.quantile(scores[torch.randperm(T, device="cuda")[:512]].float(), 1 - 0.125)[None]
        def comp(share, own, group=1024):
            def f(x, up, down):
                with torch.no_grad(): s = x @ router.T
                return cf.compact_ffn(x, up, down, cf.share_choice(s, theta, round(share * E), group), "relu", group, own)
            return f
        xd, ud = x.detach(), up.detach()
        gr = cf.choose_groups(scores, theta, 64, 1024); xs, us = cf.take_rows(xd, gr, 1024), cf.take_experts(ud, gr); h = torch.bmm(xs, us.mT); pw = torch.bmm(h.mT, xs)
        calls = {"dense": step(dense_fn), "dense compiled": step(cd), "own 25%": step(comp(.25, True)), "all 18.75%": step(comp(.1875, False)), "all 12.5%": step(comp(.125, False)), "all 12.5% g2048": step(comp(.125, False, 2048)),
            "scores": lambda: xd @ router.T, "choose 25%": lambda: cf.choose_groups(scores, theta, 64, 1024), "keys": lambda: cf.sort_keys(scores), "keys+sort": lambda: cf.sort_keys(scores).short().sort(stable=True),
            "take_rows": lambda: cf.take_rows(xd, gr, 1024), "spread_rows": lambda: cf.spread_rows(xs, gr), "take_experts 25%": lambda: cf.take_experts(ud, gr), "bmm up": lambda: torch.bmm(xs, us.mT), "bmm down": lambda: torch.bmm(h, us),
            "bmm weights": lambda: torch.bmm(h.mT, xs), "activate own": lambda: cf.activate_rows(h, gr, "relu", True), "activate all": lambda: cf.activate_rows(h, gr, "relu", False), "slope": lambda: cf.times_slope(h, h, "relu"), "sum_experts 25%": lambda: cf.sum_experts(pw, gr)}
        graphs = {}
        for n, c in calls.items():
            try: graphs[n] = graphed(c)
            except Exception as e: print("no graph", n, str(e)[:200], flush=True)
        ts = dict(zip(graphs, times([g.replay for g in graphs.values()], rounds=9)))
        put("ffn", shape=name, ms=ts); best = min(ts[n] for n in ts if n.startswith("dense"))
        print(f"{name:9} " + " ".join(f"{n} {t:.3f}" + (f" (x{best/t:.2f})" if n.split()[0] in ("own", "all") else "") for n, t in ts.items()), flush=True)
        del graphs, x, dy, up, down, leaves, scores, xd, ud, xs, us, h, pw, gr, calls; torch.cuda.empty_cache()

def step():
    t_end = time.time() + float(sys.argv[2])
    for name in sys.argv[3:] or ("gpt-124m", "gpt-350m", "wide", "gpt-50m"):
        if time.time() > t_end: print("out of time before", name); break
        t0 = time.time(); s = SHAPES[name]; torch.manual_seed(1)
        with torch.device("cuda"): m = Model(s)
        m.compile_parts()
        ids, tg = (torch.randint(0, s.V, (s.B, s.L), device="cuda") for _ in range(2))
        opt = torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-4, device="cuda"), betas=(0.9, 0.95), weight_decay=0.1, fused=True, capturable=True)
        c = lambda mo, sh, ev: dict(mode=mo, chosen=round(sh * 256), tile=1024, every=ev)
        ways = {"plain": dict(mode="plain"), "own 25%": c("cown", .25, 8), "all 12.5%": c("call", .125, 8), "all 12.5% /16": c("call", .125, 16)}
        def step_of(w):
            def f():
                loss, pen = m(ids, tg, **w)
                (loss + 0.3 * pen).backward(); opt.step(); opt.zero_grad(set_to_none=True)
            return f
        ts = {}
        for n, w in [*ways.items(), ("plain again", ways["plain"])]:  # one at a time: each graph holds a step's memory
            try:
                g = graphed(step_of(w)); ts[n] = times([g.replay], rounds=7)[0]; del g
            except Exception as e: print("no graph", name, n, str(e)[:300], flush=True)
            torch.cuda.empty_cache()
        for n, t in ts.items():
            put("step", shape=name, way=n, ms=t, tokens_s=s.T / t * 1e3, dense_mfu=s.dense() * s.T / t / 1e9 / 989, ratio=ts["plain"] / t)
            print(f"{name:9} {n:14} {t:8.2f} ms {s.T/t/1e3:6.3f} Mtok/s dense-equivalent MFU {s.dense()*s.T/t/1e9/989:.3f} x{ts['plain']/t:.2f} ({time.time()-t0:.0f}s)", flush=True)
        del m, opt; torch.cuda.empty_cache()

if __name__ == "__main__": {"ffn": ffn, "step": step}[sys.argv[1]]()
