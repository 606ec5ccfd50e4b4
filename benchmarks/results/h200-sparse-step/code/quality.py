"""python quality.py warm MODE | run RUN... ; JSON lines under $OUT/quality.jsonl."""

import json
import lzma
import multiprocessing as mp
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from peer import *
from training.assignment import cluster_prices

OUT = os.environ.get("OUT", "results")
HERE = os.path.dirname(os.path.abspath(__file__))
TMP = "/tmp/proto_tokens"
DEV = "cuda" if torch.cuda.is_available() else "cpu"


def put(name, **kw):
    with open(f"{OUT}/quality.jsonl", "a") as f:
        f.write(json.dumps({"name": name, **kw}) + "\n")


def sync():
    if DEV == "cuda":
        torch.cuda.synchronize()


# --- data ---
def _encode(text):
    import tokenizers

    global _tok
    if "_tok" not in globals():
        _tok = tokenizers.Tokenizer.from_file(f"{HERE}/data/tokenizer.json")
    return np.array(_tok.encode(text).ids, dtype=np.uint16)


def tokenise(files, out):
    if os.path.exists(out):
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.makedirs(TMP, exist_ok=True)
    parts = []
    for f in files:
        text = lzma.open(f"{HERE}/data/{f}", "rb").read().decode("utf-8", "ignore")
        parts += [text[i : i + 500_000] for i in range(0, len(text), 500_000)]
    with mp.get_context("fork").Pool(15 if DEV == "cuda" else 2) as pool:
        ids = pool.map(_encode, parts, chunksize=2)
    np.save(out + ".tmp.npy", np.concatenate(ids))
    os.rename(out + ".tmp.npy", out)


def data():
    t = time.time()
    tokenise(
        ["books-1.txt.xz", "books-2a.txt.xz"]
        if not os.environ.get("TINY")
        else ["valid-books.txt.xz"],
        f"{TMP}/train.npy",
    )
    tokenise(["valid-books.txt.xz"], f"{TMP}/valid.npy")
    a, b = (
        torch.from_numpy(np.load(f"{TMP}/{n}.npy").astype(np.int16))
        for n in ("train", "valid")
    )
    print(f"tokens {a.numel()} {b.numel()} in {time.time() - t:.1f}s", flush=True)
    return a, b


def rows(tokens, L):
    n = (tokens.numel() - 1) // L
    i = tokens[: n * L].view(n, L)
    t = tokens[1 : n * L + 1].view(n, L)
    return i.to(DEV), t.to(DEV)


# --- clustering ---
def balanced(rows_FD, clusters, generator, iterations=12):
    u = F.normalize(rows_FD.float(), dim=1)
    n = u.shape[0]
    c = u[torch.randperm(n, generator=generator)[:clusters].to(u.device)]
    prices = None
    for _ in range(iterations):
        sim = u @ c.T
        prices = cluster_prices(sim, prices)
        lab = (sim - prices).argmax(1)
        c = F.normalize(
            (lab == torch.arange(clusters, device=u.device)[:, None]).float() @ u, dim=1
        )
    offer = (u @ c.T - prices).cpu().numpy()
    lab = offer.argmax(1)
    cap = n // clusters
    count = np.bincount(lab, minlength=clusters)
    second = np.sort(offer, 1)[:, -2]
    loss = offer.max(1) - second
    for r in np.argsort(loss):
        if count[lab[r]] > cap:
            room = count < cap
            e = int(np.where(room, offer[r], -1e9).argmax())
            count[lab[r]] -= 1
            count[e] += 1
            lab[r] = e
    assert (count == cap).all()
    lab = torch.from_numpy(lab).to(u.device)
    c = F.normalize(
        (lab == torch.arange(clusters, device=u.device)[:, None]).float() @ u, dim=1
    )
    return lab, c


@torch.no_grad()
def cluster(model, opt, per_unit=4):
    g = torch.Generator().manual_seed(7)
    for b in model.blocks:
        lab, c = balanced(b.up, model.s.E, g)
        coarse, _ = balanced(c, model.s.E // per_unit, g)
        rank = torch.empty_like(coarse)
        rank[coarse.argsort(stable=True)] = torch.arange(model.s.E, device=DEV)
        order = rank[lab].argsort(stable=True)
        for p in (b.up, b.down):
            p.copy_(p[order])
            st = opt.state[p]
            for k in ("exp_avg", "exp_avg_sq"):
                st[k].copy_(st[k][order])


@torch.no_grad()
def inputs_of(model, ids):
    """Each layer's FFN input, run dense and eager."""
    x, out = model.emb[ids].bfloat16(), []
    for b in model.blocks:
        a = b.attend(x, model.cos, model.sin)
        z = F.rms_norm(a, (model.s.D,), b.n2.bfloat16()).flatten(0, 1)
        out.append(z)
        x = a + ((z @ b.up.bfloat16().T).relu() @ b.down.bfloat16()).view_as(a)
    return out


@torch.no_grad()
def set_theta(model, ids, shares=(0.125, 0.0625)):
    for b, z in zip(model.blocks, inputs_of(model, ids)):
        s = b.scores(z).float().flatten().sort().values
        for w, share in enumerate(shares):
            b.theta[w] = s[int((1 - share) * (s.numel() - 1))]


@torch.no_grad()
def evaluate(model, vi, vt, mode, which=0):
    comp, model.compiled = model.compiled, (Block.forward, head_loss)
    total = 0.0
    for i in range(0, vi.shape[0], 64):
        l, _ = model(
            vi[i : i + 64].long(),
            vt[i : i + 64].long(),
            mode=mode,
            which=which,
            share=0.0,
            reduce=False,
        )
        total += float(l)
    model.compiled = comp
    return float(np.exp(total / vi.numel()))


@torch.no_grad()
def used(model, ids, which):
    return statistics.mean(
        float((b.scores(z).float() > b.theta[which]).float().mean())
        for b, z in zip(model.blocks, inputs_of(model, ids))
    )


# --- what one tile would hold ---
@torch.no_grad()
def coverage(model, ids, name, layers=(1, 4, 7)):
    layers = [l for l in layers if l < model.s.N]
    zs = inputs_of(model, ids)
    lines = {}
    for li in layers:
        b, z, s = model.blocks[li], zs[li], model.s
        sc = b.scores(z).float()
        T = sc.shape[0]
        mass = torch.cat(
            [
                (c @ b.up.bfloat16().T).relu().float().view(-1, s.E, s.S).sum(-1)
                for c in z.split(16384)
            ]
        )
        own = sc > b.theta[0]
        tot = mass.sum()
        ownmass = (mass * own).sum()
        lines.setdefault("own 12.5%: share used, mass inside", []).append(
            (float(own.float().mean()), float(ownmass / tot))
        )
        top = torch.zeros_like(own).scatter_(1, sc.topk(s.E // 8, dim=1).indices, True)
        lines.setdefault("top-k 12.5%: mass inside", []).append(
            (0.125, float((mass * top).sum() / tot))
        )
        best = sc.view(T, 64, -1).mean(2)
        o = best.topk(2, dim=1).indices
        c = sc[torch.randperm(T, device=DEV)[:64]]
        for _ in range(8):  # k-means of the scores: 64 groups of tokens
            a = (
                F.normalize(sc - sc.mean(0), dim=1)
                @ F.normalize(c - sc.mean(0), dim=1).T
            ).argmax(1)
            c = torch.stack(
                [
                    sc[a == g].mean(0) if bool((a == g).any()) else sc[0]
                    for g in range(64)
                ]
            )
        count = own.sum(1)
        orders = {
            "sequence": torch.arange(T, device=DEV),
            "best unit": o[:, 0].sort(stable=True).indices,
            "best, second": (o[:, 0] * 64 + o[:, 1]).sort(stable=True).indices,
            "kmeans64": a.sort(stable=True).indices,
            "kmeans64, count": (a * 1024 + count).sort(stable=True).indices,
        }
        for on, order in orders.items():
            if on not in ("best, second", "kmeans64"):
                continue
            for tile in (128, 512, 1024):
                m_n, w_n, s_n = (
                    v[order].view(T // tile, tile, s.E) for v in (mass, own.float(), sc)
                )
                mt, ot, st = m_n.sum(1), w_n.sum(1), s_n.mean(1)
                om = (m_n * w_n).sum(1)
                for per in (1,):
                    for votes_name, v in (
                        (("votes", ot), ("mean score", st), ("mass", mt))
                        if (on == "best unit" and tile == 128 and per == 1)
                        else (("votes", ot),)
                    ):
                        u = v.view(v.shape[0], -1, per).sum(2)
                        for share in (0.125, 0.1875, 0.25, 0.375, 0.5):
                            k = round(share * u.shape[1])
                            pick = (
                                torch.zeros_like(u, dtype=torch.bool)
                                .scatter_(1, u.topk(k, dim=1).indices, True)
                                .repeat_interleave(per, 1)
                            )
                            lines.setdefault(
                                f"{on:16} tile {tile:3} unit {per} {votes_name:10} {share:6.4f}",
                                [],
                            ).append(
                                (
                                    float((mt * pick).sum() / tot),
                                    float((om * pick).sum() / ownmass),
                                    float((ot * pick).sum() / ot.sum()),
                                )
                            )
                            if (
                                share in (0.125, 0.25) and votes_name == "votes"
                            ):  # the most wanted pairs of all tiles
                                flat = u.flatten()
                                gp = torch.zeros_like(flat, dtype=torch.bool)
                                gp[flat.topk(round(share * flat.numel())).indices] = (
                                    True
                                )
                                gp = gp.view_as(u).repeat_interleave(per, 1)
                                lines.setdefault(
                                    f"{on:16} tile {tile:3} unit {per} global     {share:6.4f}",
                                    [],
                                ).append(
                                    (
                                        float((mt * gp).sum() / tot),
                                        float((om * gp).sum() / ownmass),
                                        float((ot * gp).sum() / ot.sum()),
                                    )
                                )
                if tile in (128, 512, 1024):
                    lines.setdefault(f"{on:16} tile {tile:3} union of own", []).append(
                        (float((ot > 0).float().mean()),)
                    )
        del mass, own, sc
    for k, v in lines.items():
        put("coverage", run=name, what=k, by_layer=v)
        if "kmeans64, count" not in k:
            print(
                "cov",
                k,
                " | ".join(" ".join(f"{x:.3f}" for x in t) for t in v),
                flush=True,
            )


# --- training ---
def mode_kw(kind, which=0, r=None):
    share = (0.125, 0.0625)[which]
    if kind == "plain":
        return dict(mode="plain")
    if kind in ("dense", "budget"):
        return dict(mode=kind, which=which, every=8, share=share)
    if kind[0] == "c":
        return dict(
            mode=kind,
            which=which,
            every=8,
            share=share,
            chosen=round(r["tile_share"] * 256),
            tile=r["tile"],
        )
    return dict(
        mode=kind,
        which=which,
        every=8,
        share=share,
        unit=r["unit"],
        chosen=round(r["tile_share"] * 6144 / r["unit"]),
        tile=r.get("tile", 128),
    )


RUNS = {
    "cown25": dict(sparse="cown", tile_share=0.25, tile=1024),
    "cown25g512": dict(sparse="cown", tile_share=0.25, tile=512),
    "cown25g256": dict(sparse="cown", tile_share=0.25, tile=256),
    "call25": dict(sparse="call", tile_share=0.25, tile=1024),
    "call12": dict(sparse="call", tile_share=0.125, tile=1024),
    "call12g512": dict(sparse="call", tile_share=0.125, tile=512),
    "call19": dict(sparse="call", tile_share=0.1875, tile=1024),
    "cown19": dict(sparse="cown", tile_share=0.1875, tile=1024),
    "cown37": dict(sparse="cown", tile_share=0.375, tile=1024),
    "dense": dict(sparse=None),
    "budget": dict(sparse="budget"),
    "own25": dict(sparse="own", unit=24, tile_share=0.25),
    "all25": dict(sparse="all", unit=24, tile_share=0.25),
    "own25u4": dict(sparse="own", unit=96, tile_share=0.25),
    "all25u4": dict(sparse="all", unit=96, tile_share=0.25),
    "all12": dict(sparse="all", unit=24, tile_share=0.125),
    "all12u4": dict(sparse="all", unit=96, tile_share=0.125),
    "own37u4": dict(sparse="own", unit=96, tile_share=0.375),
    "own19": dict(sparse="own", unit=24, tile_share=0.1875),
}


def plan_steps(r, steps):
    out = []
    for i in range(steps):
        p = i / steps
        if r["sparse"] is None:
            out.append(("plain", 0, 0.0))
        elif p < 0.05:
            out.append(("dense", 0, 0.03))
        elif p < 0.8:
            out.append((r["sparse"], 0, 0.3))
        else:
            out.append(
                (
                    ("dense", 0, 0.03),
                    ("budget", 0, 0.3),
                    ("dense", 0, 0.03),
                    ("budget", 1, 0.3),
                )[i % 4]
            )
    return out


def train(name, steps, d, compiled, shape="gpt-50m", lr=1.5e-3, study=False):
    s = SHAPES[shape]
    r = RUNS[name]
    ti, tt, vi, vt = d
    torch.manual_seed(1)
    with torch.device(DEV):
        model = Model(s)
    model.compiled = compiled
    opt = optimizer_of(model, lr, DEV == "cuda")
    order = torch.randperm(ti.shape[0], generator=torch.Generator().manual_seed(5))
    order = torch.cat([order, order, order]).to(DEV)
    set_theta(model, ti[order[:32]].long())
    plan = plan_steps(r, steps)
    events = []
    clustered = False
    t0 = time.time()
    losses = []
    cluster_s = 0
    for i, (kind, which, w) in enumerate(plan):
        if r["sparse"] and not clustered and i >= 0.05 * steps:
            sync()
            c0 = time.time()
            cluster(model, opt)
            set_theta(model, ti[order[i * s.B : i * s.B + 32]].long())
            clustered = True
            sync()
            cluster_s = time.time() - c0
        for gr in opt.param_groups:
            gr["lr"] = (
                lr
                * min(1, (i + 1) / (0.05 * steps))
                * 0.5
                * (1 + math.cos(math.pi * i / steps))
            )
        a, b = (
            torch.cuda.Event(enable_timing=True) if DEV == "cuda" else None
            for _ in range(2)
        )
        a and a.record()
        sel = order[i * s.B : (i + 1) * s.B]
        loss, pen = model(ti[sel].long(), tt[sel].long(), **mode_kw(kind, which, r))
        (loss + w * pen).backward() if w else loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        opt.step()
        opt.zero_grad(set_to_none=True)
        b and b.record()
        events.append((kind, which, a, b))
        losses.append(loss.detach())
        if i % 100 == 99:
            print(
                f"{name} {i + 1} {kind} loss {float(loss):.3f} pen {float(pen):.3f} {time.time() - t0:.1f}s",
                flush=True,
            )
    sync()
    wall = time.time() - t0
    ms = {}
    for k, wch, a, b in events:
        ms.setdefault(f"{k}{wch}", []).append(a.elapsed_time(b) if a else 1.0)
    med = {k: (statistics.median(v), len(v)) for k, v in ms.items()}
    train_s = sum(m * n for m, n in med.values()) / 1e3
    sample = ti[
        torch.randperm(ti.shape[0], generator=torch.Generator().manual_seed(9))[:64].to(
            DEV
        )
    ].long()
    early = {w: used(model, vi[:64].long(), w) for w in (0, 1)} if r["sparse"] else {}
    if r["sparse"] is None:
        cluster(model, opt)
    set_theta(model, sample)
    ppl = {
        "dense": evaluate(model, vi, vt, "plain"),
        "12.5%": evaluate(model, vi, vt, "budget", 0),
        "6.25%": evaluate(model, vi, vt, "budget", 1),
    }
    use = {w: used(model, vi[:64].long(), w) for w in (0, 1)}
    fl = 0.0
    for kind, which, w in plan:
        share = (0.125, 0.0625)[which]
        fl += s.T * (
            s.dense()
            if kind == "plain"
            else s.dense() + 2 * s.N * s.D * s.E / 8
            if kind == "dense"
            else s.sparse(share)
            if kind == "budget"
            else s.sparse(r["tile_share"])
        )
    put(
        "run",
        run=name,
        steps=steps,
        tokens=steps * s.T,
        ppl=ppl,
        used=use,
        used_train_theta=early,
        pflop=fl / 1e15,
        dense_pflop=steps * s.T * s.dense() / 1e15,
        step_ms=med,
        train_s=train_s,
        wall_s=wall,
        cluster_s=cluster_s,
        losses=[round(float(l), 4) for l in torch.stack(losses)[::10]],
    )
    print(
        f"RUN {name:8} {steps} steps {steps * s.T / 1e6:.1f}M: dense {ppl['dense']:.2f}  12.5% {ppl['12.5%']:.2f} (used {use[0]:.3f})  6.25% {ppl['6.25%']:.2f}  PFLOP {fl / 1e15:.1f} of {steps * s.T * s.dense() / 1e15:.1f}  train {train_s:.1f}s (cluster {cluster_s:.1f}s)  ms { ({k: round(v[0], 1) for k, v in med.items()}) }",
        flush=True,
    )
    if study:
        coverage(model, ti[order[:128]].long(), name)
    del model, opt
    torch.cuda.empty_cache()


def main():
    path = f"{HERE}/blocks.json"
    path = f"{OUT}/blocks.json" if os.path.exists(f"{OUT}/blocks.json") else path
    if os.path.exists(path) and "gpt-50m" in (b := json.load(open(path))):
        from speed import set_blocks

        set_blocks(b["gpt-50m"], 96)
        tf.weights_blocks = WB
    c = (
        (lambda f: f)
        if os.environ.get("TINY")
        else (lambda f: torch.compile(f, fullgraph=True, dynamic=False))
    )
    compiled = (c(Block.forward), c(head_loss))
    if sys.argv[1] == "warm":
        kind, which = sys.argv[2].rstrip("01"), int(sys.argv[2][-1])
        r = RUNS.get(sys.argv[3]) if len(sys.argv) > 3 else None
        with torch.device(DEV):
            m = Model(SHAPES["gpt-50m"])
        m.compiled = compiled
        ids = torch.randint(0, 8192, (128, 512), device=DEV)
        t = time.time()
        l, p = m(ids, ids, **mode_kw(kind, which, r))
        (l + 0.3 * p).backward()
        sync()
        print("warm", sys.argv[2:], f"{time.time() - t:.1f}s", float(l), flush=True)
        return
    if sys.argv[1] == "tokens":
        data()
        return
    a, b = data()
    d = (*rows(a, SHAPES["gpt-50m"].L), *rows(b, SHAPES["gpt-50m"].L))
    t_end = time.time() + float(sys.argv[2])
    for item in sys.argv[3:]:
        name, steps, *rest = item.split(":")
        if time.time() > t_end:
            print("out of time before", item, flush=True)
            continue
        try:
            train(name, int(steps), d, compiled, study="study" in rest)
        except Exception as e:
            import traceback

            traceback.print_exc()
            put("failed", run=item, error=str(e)[:500])


WB = tf.weights_blocks
if __name__ == "__main__":
    main()
