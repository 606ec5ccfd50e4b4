"""A compiled plain decoder, and the same with a sparse FFN: RMSNorm, rotary, GQA by SDPA, tied head."""

import math
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "base"))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import compact_ffn as cf
import tile_ffn as tf
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

torch._dynamo.config.recompile_limit = 64


@dataclass
class Shape:
    D: int
    F: int
    N: int
    H: int
    KV: int
    V: int
    L: int
    B: int
    E: int = 256

    @property
    def S(self):
        return self.F // self.E

    @property
    def T(self):
        return self.L * self.B

    def base(self):
        return (
            self.N
            * (4 * self.D**2 * (1 + self.KV / self.H) / 2 * 2 / 2 + 2 * self.D * self.L)
            + 2 * self.D * self.V
        )

    # docs/ssd.md: 4 D^2 + 4 D^2 G/H per layer (2 FLOPs per weight)
    def flops_base(self):
        return (
            self.N
            * (4 * self.D**2 + 4 * self.D**2 * self.KV / self.H + 2 * self.D * self.L)
            + 2 * self.D * self.V
        )

    def flops_ffn(self):
        return 4 * self.N * self.D * self.F

    def dense(self):
        return 3 * (self.flops_base() + self.flops_ffn())

    def sparse(self, share, every=8):
        return (
            3 * (self.flops_base() + self.flops_ffn() * share)
            + 3 * self.flops_ffn() / 2 / every
            + 2 * self.N * self.D * self.E
        )


SHAPES = {
    "gpt-50m": Shape(384, 6144, 9, 6, 2, 8192, 512, 128),
    "gpt-124m": Shape(768, 6144, 10, 12, 4, 16384, 1024, 64),
    "gpt-350m": Shape(1024, 8192, 16, 16, 4, 16384, 1024, 64),
    "wide": Shape(2048, 16384, 4, 16, 4, 16384, 1024, 32),
}
if os.environ.get("TINY"):
    SHAPES["gpt-50m"] = Shape(32, 6144, 2, 2, 1, 8192, 64, 4)
if os.environ.get("LAYERS"):
    for _s in SHAPES.values():
        _s.N = int(os.environ["LAYERS"])


def norm(x):
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def penalty_of(x, up, own, S):
    """Share of the activation mass outside each token's own experts; x: sampled tokens."""
    h = (x @ up.T).relu()
    mass = h.float().view(h.shape[0], -1, S).sum(-1)
    return 1 - (mass * own).sum() / mass.sum().clamp_min(1e-9)


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        hd = s.D // s.H
        self.qkv = nn.Parameter(torch.randn(s.D + 2 * s.KV * hd, s.D) * 0.02)
        self.out = nn.Parameter(torch.randn(s.D, s.D) * 0.02 / math.sqrt(2 * s.N))
        self.n1 = nn.Parameter(torch.ones(s.D))
        self.n2 = nn.Parameter(torch.ones(s.D))
        self.up = nn.Parameter(torch.randn(s.F, s.D) * 0.02)
        self.down = nn.Parameter(torch.randn(s.F, s.D) * 0.02 / math.sqrt(2 * s.N))
        self.register_buffer("theta", torch.zeros(2))  # budgets 12.5%, 6.25%

    def attend(self, x, cos, sin):
        s, hd = self.s, self.s.D // self.s.H
        B, L, D = x.shape
        low = torch.bfloat16
        q, k, v = (F.rms_norm(x, (D,), self.n1.to(low)) @ self.qkv.to(low).T).split(
            (D, s.KV * hd, s.KV * hd), -1
        )
        q, k, v = (t.view(B, L, -1, hd).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + y.transpose(1, 2).reshape(B, L, D) @ self.out.to(low).T

    def router(self):
        with torch.no_grad():
            r = (
                F.normalize(self.up.float(), dim=1)
                .view(self.s.E, self.s.S, self.s.D)
                .mean(1)
            )
            return F.normalize(r, dim=1).to(torch.bfloat16)

    def scores(self, z):
        with torch.no_grad():
            return z @ self.router().T

    def adapt(self, own_mean, spread, which, share):
        """theta follows its budget: the share used should be the budget."""
        with torch.no_grad():
            self.theta[which].add_(spread * (own_mean - share))

    def forward(
        self,
        x,
        cos,
        sin,
        mode: str,
        which: int,
        unit: int,
        chosen: int,
        tile: int,
        every: int,
        share: float,
    ):
        """mode: dense | budget (masked) | own | all (tiles). Returns x, penalty (0-dim)."""
        s = self.s
        x = self.attend(x, cos, sin)
        z = F.rms_norm(x, (s.D,), self.n2.to(torch.bfloat16)).flatten(0, 1)
        up, down = self.up.to(torch.bfloat16), self.down.to(torch.bfloat16)
        pen = torch.zeros((), device=x.device)
        if mode == "plain":
            return x + ((z @ up.T).relu() @ down).view_as(x), pen
        scores = self.scores(z)
        with torch.no_grad():
            theta = self.theta[which].clone()
            own = scores.float() > theta
        if mode in ("dense", "budget"):
            h = (z @ up.T).relu()
            if every:
                m = h[::every].float().view(-1, s.E, s.S).sum(-1)
                pen = 1 - (m * own[::every]).sum() / m.sum().clamp_min(1e-9)
            if mode == "budget":
                h = (h.view(-1, s.E, s.S) * own[:, :, None]).flatten(1)
            y = h @ down
        elif mode in ("cown", "call"):
            groups = cf.share_choice(scores, theta[None], chosen, tile)
            y = cf.compact_ffn(z, up, down, groups, "relu", tile, mode == "cown")
            if every:
                pen = penalty_of(z[::every], up, own[::every], s.S)
        else:
            plan = tf.plan_tiles(scores, theta[None], s.F // unit, chosen, tile)
            y = tf.tile_ffn(z, up, down, plan, "relu", tile, mode == "own")
            if every:
                pen = penalty_of(z[::every], up, own[::every], s.S)
        if share > 0:
            self.adapt(own.float().mean(), scores.float().std(), which, share)
        return x + y.view_as(x), pen


class Model(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.emb = nn.Parameter(torch.randn(s.V, s.D) * 0.02)
        self.nf = nn.Parameter(torch.ones(s.D))
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.N))
        hd = s.D // s.H
        a = torch.outer(
            torch.arange(s.L).float(), 10000.0 ** (-torch.arange(0, hd, 2).float() / hd)
        )
        self.register_buffer("cos", a.cos()[None, None].bfloat16())
        self.register_buffer("sin", a.sin()[None, None].bfloat16())
        self.compiled = None

    def compile_parts(self, on=True):
        c = (
            (lambda f: torch.compile(f, fullgraph=True, dynamic=False))
            if on
            else (lambda f: f)
        )
        self.compiled = c(Block.forward), c(head_loss)

    def forward(
        self,
        ids,
        targets,
        mode="plain",
        which=0,
        unit=24,
        chosen=64,
        tile=128,
        every=0,
        share=0.125,
        reduce=True,
    ):
        block, head = self.compiled
        x = self.emb[ids].bfloat16()
        pens = []
        for b in self.blocks:
            x, p = block(
                b, x, self.cos, self.sin, mode, which, unit, chosen, tile, every, share
            )
            pens.append(p)
        return head(x, self.nf, self.emb, targets, reduce), torch.stack(pens).mean()


def head_loss(x, nf, emb, targets, reduce: bool):
    x = F.rms_norm(x, (x.shape[-1],), nf.to(torch.bfloat16))
    logits = x.flatten(0, 1) @ emb.to(torch.bfloat16).T
    return F.cross_entropy(
        logits.float(), targets.flatten(), reduction="mean" if reduce else "sum"
    )


def optimizer_of(model, lr=1.5e-3, fused=True):
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )
