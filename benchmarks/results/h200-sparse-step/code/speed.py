"""python speed.py warm NAME MODE | ffn | step ;  results as JSON lines under $OUT."""

import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from engine.kernels import grouped_training
from peer import *

OUT = os.environ.get("OUT", "results")
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def put(name, **kw):
    with open(f"{OUT}/speed.jsonl", "a") as f:
        f.write(json.dumps({"name": name, **kw}) + "\n")


def times(calls, rounds=7, warm=2):
    """Median ms of each call, in turn."""
    got = [[] for _ in calls]
    for r in range(rounds + warm):
        for i, c in enumerate(calls):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            c()
            b.record()
            b.synchronize()
            if r >= warm:
                got[i].append(a.elapsed_time(b))
    return [statistics.median(g) for g in got]


def similar_tokens(T, D, groups=64):
    """Tokens that lie about centres of unequal popularity, as sorted text does."""
    c = torch.randn(groups, D, device="cuda")
    p = 1 / torch.arange(1, groups + 1, device="cuda").float() ** 0.5
    g = torch.multinomial(p, T, replacement=True)
    return (0.5 * c[g] + torch.randn(T, D, device="cuda")).bfloat16()


HID = [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4)]
OUTC = [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4)]
WEI = [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 4)]


def tune(x, dy, up, down, plan, tile, own, unit):
    T, D = x.shape
    res = {}
    hb = lambda c: dict(BLOCK_W=c[0], BLOCK_D=c[1], num_warps=c[2], num_stages=c[3])
    ob = lambda c: dict(BLOCK_D=c[0], BLOCK_W=c[1], num_warps=c[2], num_stages=c[3])
    us = [tf.unit_blocks(unit)]
    if us[0][1]:
        us.append((tf.next_power_of_2(unit), 0))
    wb = lambda c, u: dict(
        BLOCK_U=u[0],
        BLOCK_V=u[1],
        BLOCK_D=c[0],
        BLOCK_T=c[1],
        num_warps=c[2],
        num_stages=c[3],
    )
    h = tf.hidden(x, up, plan, "relu", tile, own)
    work = {
        "hidden": [
            (c, lambda c=c: tf.hidden(x, up, plan, "relu", tile, own, blocks=hb(c)))
            for c in HID
        ],
        "hidden_back": [
            (
                c,
                lambda c=c: tf.hidden(
                    dy, down, plan, "relu", tile, h_RW=h, blocks=hb(c)
                ),
            )
            for c in HID
        ],
        "output": [
            (c, lambda c=c: tf.output(h, down, plan, T, tile, blocks=ob(c)))
            for c in OUTC
            if D % c[0] == 0
        ],
        "weights": [
            ((*c, *u), lambda c=c, u=u: tf.weights(h, x, plan, tile, blocks=wb(c, u)))
            for u in us
            for c in WEI
            if D % c[0] == 0
        ],
    }
    for part, ways in work.items():
        ok = []
        for c, f in ways:
            try:
                f()
                torch.cuda.synchronize()
                ok.append((c, f))
            except Exception as e:
                put("failed", part=part, config=list(c), error=str(e)[:200])
        ts = times([f for _, f in ok], rounds=5, warm=1)
        best = min(range(len(ok)), key=lambda i: ts[i])
        res[part] = (ok[best][0], ts[best], {str(c): t for (c, _), t in zip(ok, ts)})
    return res


def set_blocks(best, unit, save=None):
    if save:
        path = f"{OUT}/blocks.json"
        old = json.load(open(path)) if os.path.exists(path) else {}
        old[save] = {k: [list(v[0])] for k, v in best.items()}
        json.dump(old, open(path, "w"))
    c = best["hidden"][0]
    cb = best["hidden_back"][0]
    o = best["output"][0]
    w = best["weights"][0]
    tf.hidden_blocks = lambda i, back: (
        lambda c: dict(BLOCK_W=c[0], BLOCK_D=c[1], num_warps=c[2], num_stages=c[3])
    )(cb if back else c)
    tf.output_blocks = lambda i, d: dict(
        BLOCK_D=o[0], BLOCK_W=o[1], num_warps=o[2], num_stages=o[3]
    )
    tf.weights_blocks = lambda i, u, d: dict(
        BLOCK_U=w[4],
        BLOCK_V=w[5],
        BLOCK_D=w[0],
        BLOCK_T=w[1],
        num_warps=w[2],
        num_stages=w[3],
    )


def dense_fn(x, up, down):
    return (x @ up.T).relu() @ down


FFN = [
    ("gpt-124m", 768, 6144, 65536),
    ("gpt-350m", 1024, 8192, 65536),
    ("350m-wide", 1024, 16384, 65536),
    ("wide", 2048, 16384, 32768),
    ("gpt-50m", 384, 6144, 65536),
]


def ffn():
    E = 256
    t_end = time.time() + float(sys.argv[2]) if len(sys.argv) > 2 else 1e18
    cd = torch.compile(dense_fn, dynamic=False)
    for name, D, Fn, T in FFN:
        if time.time() > t_end:
            print("out of time before", name)
            break
        S = Fn // E
        tile = 128
        torch.manual_seed(0)
        x = similar_tokens(T, D)
        dy = torch.randn(T, D, device="cuda").bfloat16()
        up = torch.randn(Fn, D, device="cuda") / D**0.5
        down = (torch.randn(Fn, D, device="cuda") / Fn**0.5).bfloat16()
        router = F.normalize(
            F.normalize(up, dim=1).view(E, S, D).mean(1), dim=1
        ).bfloat16()
        up = up.bfloat16()
        leaves = [t.requires_grad_() for t in (x, up, down)]
        step = lambda f: lambda: torch.autograd.grad(f(*leaves), leaves, dy)
        flop = 12 * T * D * Fn
        with torch.no_grad():
            scores = x @ router.T
            theta = torch.quantile(
                scores[torch.randperm(T, device="cuda")[:512]].float(), 1 - 0.125
            )[None]

        # dense eager, dense compiled, grouped at 12.5% (routing included)
        def grouped(x, up, down):
            with torch.no_grad():
                routed = grouped_training.route_top_k(x @ router.T, E // 8)
            return grouped_training.grouped_ffn(x, up, down, routed, "relu")

        calls = {"dense eager": step(dense_fn), "dense compiled": step(cd)}
        if name != "350m-wide":
            calls["grouped 12.5%"] = step(grouped)
        ts = dict(zip(calls, times(list(calls.values()), rounds=5)))
        dense = min(ts["dense eager"], ts["dense compiled"])
        for n, t in ts.items():
            put(
                "ffn",
                shape=name,
                way=n,
                ms=t,
                over_compiled=ts["dense compiled"] / t,
                dense_tflops=flop / t / 1e9,
            )
            print(
                f"{name:10} {n:28} {t:8.3f} ms  x{ts['dense compiled'] / t:5.2f}  {flop / t / 1e9:6.0f} TFLOP/s dense-equivalent",
                flush=True,
            )
        big = {24: 96, 32: 128, 64: 128}[S]
        first = True
        for share, unit in (
            (0.25, S),
            (0.25, big),
            (0.125, big),
            (0.375, big),
            (0.125, S),
        ):
            G, K = Fn // unit, round(share * Fn / unit)
            plan = tf.tile_plan(scores, theta, G, K, tile)
            with torch.no_grad():
                best = tune(
                    x.detach(), dy, up.detach(), down.detach(), plan, tile, True, unit
                )
            set_blocks(best, unit, name if (share == 0.25 and unit == big) else None)

            def tiled(x, up, down, own=True):
                with torch.no_grad():
                    s = x @ router.T
                plan = tf.plan_tiles(s, theta, G, K, tile)
                return tf.tile_ffn(x, up, down, plan, "relu", tile, own)

            xd = x.detach()
            calls = {
                "own": step(tiled),
                "all": step(lambda *a: tiled(*a, own=False)),
                "plan": lambda: tf.tile_plan(xd @ router.T, theta, G, K, tile),
                "dense": step(cd),
            }
            ts = dict(zip(calls, times(list(calls.values()), rounds=5)))
            parts = {p: (list(b[0]), round(b[1], 4)) for p, b in best.items()}
            part_flop = flop / 6 * share
            put(
                "tile",
                shape=name,
                share=share,
                unit=unit,
                ms=ts,
                parts=parts,
                all_configs={p: b[2] for p, b in best.items()},
                ratio=ts["dense"] / ts["own"],
                load=[
                    int(v)
                    for v in (plan.offsets_G1[1:] - plan.offsets_G1[:-1])
                    .sort()
                    .values[:: max(1, G // 16)]
                    .tolist()
                ],
                tiles=plan.ids_NK.shape[0],
            )
            print(
                f"{name:10} tile {share:5.3f} unit {unit:3}: own {ts['own']:.3f} (x{ts['dense'] / ts['own']:.2f}) all {ts['all']:.3f} plan {ts['plan']:.3f} | "
                + "  ".join(
                    f"{p} {b[1]:.3f}ms {part_flop / b[1] / 1e9:.0f}T {b[0]}"
                    for p, b in best.items()
                ),
                flush=True,
            )
        del x, dy, up, down, leaves, scores
        torch.cuda.empty_cache()


def compact():
    """FFN alone: compact groups beside dense, eager and compiled."""
    import compact_ffn as cf

    E = 256
    cd = torch.compile(dense_fn, dynamic=False)
    for name, D, Fn, T in FFN:
        S = Fn // E
        torch.manual_seed(0)
        x = similar_tokens(T, D)
        dy = torch.randn(T, D, device="cuda").bfloat16()
        up = torch.randn(Fn, D, device="cuda") / D**0.5
        down = (torch.randn(Fn, D, device="cuda") / Fn**0.5).bfloat16()
        router = F.normalize(
            F.normalize(up, dim=1).view(E, S, D).mean(1), dim=1
        ).bfloat16()
        up = up.bfloat16()
        leaves = [t.requires_grad_() for t in (x, up, down)]
        step = lambda f: lambda: torch.autograd.grad(f(*leaves), leaves, dy)
        with torch.no_grad():
            scores = x @ router.T
            theta = torch.quantile(
                scores[torch.randperm(T, device="cuda")[:512]].float(), 1 - 0.125
            )[None]
        flop = 12 * T * D * Fn
        for share, group in (
            (0.25, 1024),
            (0.25, 512),
            (0.25, 2048),
            (0.1875, 1024),
            (0.125, 1024),
            (0.125, 512),
        ):
            K = round(share * E)

            def comp(x, up, down, own=True):
                with torch.no_grad():
                    s = x @ router.T
                g = cf.share_choice(s, theta, K, group)
                return cf.compact_ffn(x, up, down, g, "relu", group, own)

            xd, ud, dd = x.detach(), up.detach(), down.detach()
            calls = {
                "dense": step(cd),
                "dense eager": step(dense_fn),
                "own": step(comp),
                "all": step(lambda *a: comp(*a, own=False)),
                "choose": lambda: cf.choose_groups(xd @ router.T, theta, K, group),
            }
            if group == 1024 and share in (0.25, 0.125):
                g = cf.choose_groups(scores, theta, K, group)
                xs, us = cf.take_rows(xd, g, group), cf.take_experts(ud, g)
                h = torch.bmm(xs, us.mT)
                pw = torch.bmm(h.mT, xs)
                calls |= {
                    "keys": lambda: cf.sort_keys(scores),
                    "sort": lambda: cf.sort_keys(scores).short().sort(stable=True),
                    "take_rows": lambda: cf.take_rows(xd, g, group),
                    "spread": lambda: cf.spread_rows(xs, g),
                    "take_experts": lambda: cf.take_experts(ud, g),
                    "bmm up": lambda: torch.bmm(xs, us.mT),
                    "activate": lambda: cf.activate_rows(h, g, "relu", True),
                    "bmm down": lambda: torch.bmm(h, us),
                    "slope": lambda: cf.times_slope(h, h, "relu"),
                    "bmm weights": lambda: torch.bmm(h.mT, xs),
                    "sum": lambda: cf.sum_experts(pw, g),
                }
            ts = dict(zip(calls, times(list(calls.values()), rounds=7)))
            put(
                "compact",
                shape=name,
                share=share,
                group=group,
                ms=ts,
                ratio=ts["dense"] / ts["own"],
                ratio_all=ts["dense"] / ts["all"],
            )
            pf = flop / 6 * share
            print(
                f"{name:10} compact {share:6.4f} group {group:4}: dense {ts['dense']:.3f} eager {ts['dense eager']:.3f} own {ts['own']:.3f} (x{ts['dense'] / ts['own']:.2f}) all {ts['all']:.3f} (x{ts['dense'] / ts['all']:.2f}) choose {ts['choose']:.3f} "
                + " ".join(
                    f"{k} {v:.3f}"
                    + (f"={pf / v / 1e9:.0f}T" if k.startswith("bmm") else "")
                    for k, v in ts.items()
                    if k not in ("dense", "dense eager", "own", "all", "choose")
                ),
                flush=True,
            )
        del x, dy, up, down, leaves, scores
        torch.cuda.empty_cache()


MODES = {
    "plain": dict(mode="plain"),
    "cown8": dict(mode="cown", every=8, chosen=64, tile=1024),
    "cown16": dict(mode="cown", every=16, chosen=64, tile=1024),
    "call8": dict(mode="call", every=8, chosen=32, tile=1024),
    "call16": dict(mode="call", every=16, chosen=32, tile=1024),
    "call16b": dict(mode="call", every=16, chosen=48, tile=1024),
    "dense": dict(mode="dense", every=8),
    "own": dict(mode="own", every=8),
    "all": dict(mode="all", every=8),
    "budget": dict(mode="budget", every=8),
}


def build(name, share=0.25):
    s = SHAPES[name]
    torch.manual_seed(1)
    with torch.device("cuda"):
        m = Model(s)
    m.compile_parts()
    unit = (
        {24: 96, 32: 128, 64: 128}[s.S]
        if os.environ.get("UNIT", "big") == "big"
        else s.S
    )
    path = f"{OUT}/blocks.json"
    if os.path.exists(path) and name in (b := json.load(open(path))):
        set_blocks(b[name], unit)
    kw = dict(unit=unit, chosen=round(share * s.F / unit))
    ids = torch.randint(0, s.V, (s.B, s.L), device="cuda")
    tg = torch.randint(0, s.V, (s.B, s.L), device="cuda")
    opt = optimizer_of(m, 1e-4)
    return s, m, kw, ids, tg, opt


def one(m, opt, ids, tg, kw):
    loss, pen = m(ids, tg, **kw)
    (loss + 0.3 * pen).backward()
    opt.step()
    opt.zero_grad(set_to_none=True)
    return loss


def warm(name, mode):
    t = time.time()
    s, m, kw, ids, tg, opt = build(name)
    l = one(m, opt, ids, tg, {**kw, **MODES[mode]})
    torch.cuda.synchronize()
    print("warm", name, mode, float(l), f"{time.time() - t:.1f}s", flush=True)


def step():
    t_end = time.time() + float(sys.argv[2]) if len(sys.argv) > 2 else 1e18
    for name in ("gpt-124m", "wide", "gpt-350m", "gpt-50m"):
        if time.time() > t_end:
            print("out of time before", name)
            break
        t0 = time.time()
        s, m, kw, ids, tg, opt = build(name)
        kw12 = {**kw, "chosen": max(1, kw["chosen"] // 2)}
        c = lambda m, sh, ev: dict(mode=m, chosen=round(sh * 256), tile=1024, every=ev)
        ways = {
            "plain": MODES["plain"],
            "own 25%": c("cown", 0.25, 8),
            "own 25% /16": c("cown", 0.25, 16),
            "all 18.75% /16": c("call", 0.1875, 16),
            "all 12.5%": c("call", 0.125, 8),
            "all 12.5% /16": c("call", 0.125, 16),
        }
        for w in ways.values():
            one(m, opt, ids, tg, w)
        torch.cuda.synchronize()
        c = time.time() - t0
        ts = dict(
            zip(
                ways,
                times(
                    [lambda w=w: one(m, opt, ids, tg, w) for w in ways.values()],
                    rounds=5,
                    warm=2,
                ),
            )
        )
        for n, t in ts.items():
            mfu = s.dense() * s.T / t / 1e9 / 989
            put(
                "step",
                shape=name,
                way=n,
                ms=t,
                tokens_s=s.T / t * 1e3,
                dense_mfu=mfu,
                ratio=ts["plain"] / t,
                compile_s=c,
            )
            print(
                f"{name:9} {n:14} {t:8.2f} ms {s.T / t / 1e3:6.3f} Mtok/s dense-equivalent MFU {mfu:.3f} x{ts['plain'] / t:.2f} (compile {c:.0f}s)",
                flush=True,
            )
        del m, opt
        torch.cuda.empty_cache()


if __name__ == "__main__":
    {
        "compact": compact,
        "warm": lambda: warm(sys.argv[2], sys.argv[3]),
        "ffn": ffn,
        "step": step,
    }[sys.argv[1]]()
