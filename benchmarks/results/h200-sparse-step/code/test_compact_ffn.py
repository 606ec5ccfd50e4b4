"""python test_compact_ffn.py [--cuda]: against the masked dense layer, output and every gradient."""

import os
import sys

if "--cuda" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "base"))
import compact_ffn as cf
import torch


def err(a, b):
    return float(
        (a.detach().double() - b.detach().double()).norm()
        / b.detach().double().norm().clamp_min(1e-30)
    )


def case(T, D, E, S, K, B, act, own, dtype, device):
    torch.manual_seed(T + D)
    F = E * S
    x = torch.randn(T, D, device=device, dtype=torch.float64)
    dy = torch.randn_like(x)
    up = torch.randn(F, D, device=device, dtype=torch.float64) / D**0.5
    down = torch.randn(F, D, device=device, dtype=torch.float64) / F**0.5
    x, dy, up, down = (t.to(dtype) for t in (x, dy, up, down))
    scores = torch.randn(T, E, device=device).to(dtype)
    theta = torch.full((1,), 0.5, device=device)
    plan = cf.share_choice(scores, theta, K, B)
    ref = cf.choose_groups_reference(scores, theta, K, B)
    for name, a, b in zip(plan._fields, plan, ref):
        assert torch.equal(a, b), (name, a, b)
    leaves = [t.clone().requires_grad_() for t in (x, up, down)]
    y = cf.compact_ffn(*leaves, plan, act, B, own)
    g = torch.autograd.grad(y, leaves, dy)
    y2 = cf.compact_ffn(*leaves, plan, act, B, own)
    g2 = torch.autograd.grad(y2, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip((y, *g), (y2, *g2))), "bits"
    dl = [t.double().clone().requires_grad_() for t in (x, up, down)]
    yr = cf.compact_ffn_reference(*dl, ref, act, B, own)
    gr = torch.autograd.grad(yr, dl, dy.double())
    es = [err(a, b) for a, b in zip((y, *g), (yr, *gr))]
    lim = 2e-5 if dtype == torch.float32 else 1.5e-2
    print(
        T,
        D,
        E,
        S,
        K,
        B,
        act,
        own,
        dtype,
        ["%.2g" % e for e in es],
        "ok" if max(es) < lim else "WRONG",
        flush=True,
    )
    assert max(es) < lim
    if K < E:
        assert bool((g[1].view(E, -1)[(plan.slots_NE < 0).all(0)] == 0).all())


if __name__ == "__main__":
    dev = "cuda" if "--cuda" in sys.argv else "cpu"
    f32, b16 = torch.float32, torch.bfloat16
    torch.backends.cuda.matmul.allow_tf32 = False
    case(1, 16, 4, 16, 1, 16, "relu", False, f32, dev)
    case(37, 40, 6, 20, 2, 16, "relu", True, f32, dev)
    case(70, 72, 12, 24, 5, 32, "relu2", True, f32, dev)
    case(100, 100, 10, 12, 10, 16, "relu2", False, f32, dev)
    case(300, 64, 8, 24, 1, 256, "relu", True, b16, dev)
    case(96, 128, 16, 32, 4, 32, "relu", True, b16, dev)
    if dev == "cuda":
        for own in (False, True):
            for S in (24, 32, 64):
                case(4096 + 77, 768, 64, S, 16, 1024, "relu", own, b16, dev)
        case(1000, 384, 64, 24, 4, 128, "relu2", True, torch.float16, dev)
        case(1000, 384, 64, 24, 4, 128, "relu2", True, f32, dev)
    print("all ok")
