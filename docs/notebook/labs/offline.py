"""Offline lab: critics, consistency teachers and one-pass heads on the zoo sets, small and fast.

One run trains one set of critics, any number of teachers and any number of heads (one-pass actors) together and appends
one JSON line with the scores of all of them. Pure torch; the losses are pure functions of tensors.

    lab.py --arm NAME --dataset hopper-mixed --steps 30000 --seed 0 [--set heads.main.alpha=3 ...] [--tag X]
"""
import argparse, copy, json, math, os, time
import numpy as np, torch as th
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
REF = {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0)}
ENV = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5"}
GAMMA = 0.99

# ------------------------------------------------------------------------------------------------ networks (functional)

def init_mlp(sizes, n=1):
    ps = []
    for i, o in zip(sizes[:-1], sizes[1:]):
        b = 1 / math.sqrt(i)
        ps += [th.empty(n, i, o).uniform_(-b, b), th.empty(n, 1, o).uniform_(-b, b)]
    return [p.requires_grad_() for p in ps]

def mlp(ps, x, act, ln=False, half=True):
    """n stacked MLPs; x (B, i) or (n, B, i); hidden layers in bfloat16 when half; -> (n, B, o)"""
    n = ps[0].shape[0]
    h = x.expand(n, *x.shape) if x.ndim == 2 else x
    L = len(ps) // 2
    for i in range(L - 1):
        w, b = ps[2 * i], ps[2 * i + 1]
        if half and i > 0:
            w, b = w.bfloat16(), b.bfloat16()
        h = th.baddbmm(b, h, w) if n > 1 else F.linear(h[0], w[0].T, b[0, 0]).unsqueeze(0)
        if half and i == 0:
            h = h.bfloat16()
        if ln:
            h = F.layer_norm(h, h.shape[-1:])
        h = act(h)
    h = h.float()
    w, b = ps[-2], ps[-1]
    if w.shape[-1] == 1:
        return (h * w.mT).sum(-1, keepdim=True) + b
    return th.baddbmm(b, h, w)

class Clamp(th.autograd.Function):
    """clamp to [-1, 1]; gradient projected: dropped only where descent would go further out"""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return th.where(((x > 1) & (g < 0)) | ((x < -1) & (g > 0)), 0.0, g)

clamp = Clamp.apply

# -------------------------------------------------------------------------------------------------------- loss functions

def expectile_loss(diff, tau):
    return (th.where(diff < 0, 1 - tau, tau) * diff.square()).mean()

def q_improvement(q):
    """-mean Q / stopgrad mean |Q|"""
    return -q.mean() / q.detach().abs().mean().clamp(min=1e-6)

def sq(a, b):
    return (a - b).square().mean(-1)

def pseudo_huber(a, b):
    c = 0.00054 * math.sqrt(a.shape[-1])
    return th.sqrt((a - b).square().sum(-1) + c * c) - c

def best_neighbour(q, actions, margin):
    """q (N, B) and actions (N, B, A), the first the own one: the best, unless no gain above the margin -> (B, A), share moved"""
    best, i = q.max(0)
    i = th.where(best > q[0] + margin, i, 0)
    return actions[i, th.arange(actions.shape[1])], (i > 0).float().mean()

def advantage_weight(adv, temp, wmax=20.0):
    """exp(A / (temp mean|A|)), clipped, mean 1"""
    w = th.exp((adv / (temp * adv.abs().mean().clamp(min=1e-8))).clamp(max=math.log(wmax)))
    return w / w.mean()

def value_gate(q_data, q_pi, eta):
    """GFP: 2 sigmoid((Q(s,a) - Q(s,pi)) / (eta mean|Q|))"""
    return 2 * th.sigmoid((q_data - q_pi) / (eta * q_pi.abs().mean().clamp(min=1e-6)))

# ---------------------------------------------------------------------------------------------------- consistency teacher

S_MIN, S_MAX, S_DATA, RHO = 0.002, 80.0, 0.5, 7.0
LO, HI = S_MIN ** (1 / RHO), S_MAX ** (1 / RHO)

def scalings(s):
    a, r = s - S_MIN, (s * s + S_DATA ** 2) ** 0.5
    return S_DATA ** 2 / (a * a + S_DATA ** 2), S_DATA * a / r, 1 / r

FREQ = th.exp(-math.log(1e4) / 7 * th.arange(8))

class Teacher:
    def __init__(self, A, S, width):
        self.emb = init_mlp([16, 32, 16]); self.net = init_mlp([A + 16 + S, width, width, width, A]); self.A = A
        self.params = self.emb + self.net
    def embed(self, logs):
        t = logs.unsqueeze(-1) * FREQ
        return mlp(self.emb, th.cat([t.sin(), t.cos()], -1), F.silu, half=False)[0]
    def f(self, x, sigma, s, half=True):
        cs, co, ci = (c.unsqueeze(-1) for c in scalings(sigma))
        return cs * x + co * mlp(self.net, th.cat([ci * x, self.embed(sigma.log()), s], -1), F.silu, half=half)[0]
    def folded(self):
        """parameters of the plain MLP on (z, s) that is the network at sigma_max"""
        e = self.embed(th.tensor([math.log(S_MAX)]))
        w, A = self.net[0], self.A
        ci = S_MAX * scalings(S_MAX)[2]
        return [th.cat([ci * w[:, :A], w[:, A + 16:]], 1), self.net[1] + (e @ w[0, A:A + 16]).unsqueeze(0)] + list(self.net[2:])
    @th.no_grad()
    def snapshot(self):
        return [p.detach().clone() for p in self.folded()]

def ict_loss(T, a, s, noise, u, progress, n_first=10, n_last=160, p_mean=-1.1, p_std=2.0):
    """improved consistency training per row (Song & Dhariwal 2023)"""
    n = min(n_first * 2 ** math.floor(progress * (math.log2(n_last / n_first) + 1)), n_last) + 1
    cdf = lambda x: 0.5 * (1 + math.erf((math.log(x) - p_mean) / (math.sqrt(2) * p_std)))
    l, h = cdf(S_MIN), cdf(S_MAX)
    sig = th.exp(p_mean + p_std * th.special.ndtri(l + u * (h - l))).clamp(S_MIN, S_MAX)
    lev = ((sig ** (1 / RHO) - LO) / (HI - LO) * (n - 1)).floor().clamp(max=n - 2)
    low, high = (LO + lev / (n - 1) * (HI - LO)) ** RHO, (LO + (lev + 1) / (n - 1) * (HI - LO)) ** RHO
    with th.no_grad():
        target = T.f(a + low[:, None] * noise, low, s)
    return pseudo_huber(T.f(a + high[:, None] * noise, high, s), target) / (high - low)

C_SKIP, C_OUT = (c * k for c, k in zip(scalings(S_MAX)[:2], (S_MAX, 1.0)))

def one_pass(ps, z, s, half=True):
    """f(z, s), not clamped: the consistency network at sigma_max, or a student of its shape"""
    return C_SKIP * z + C_OUT * mlp(ps, th.cat([z, s], -1), F.silu, half=half)[0]

# ------------------------------------------------------------------------------------------------------------------ arms

CRITIC = dict(kind="td", n=2, ln=True, lr=1e-3, tau=0.005, b2=0.0, agg="min", expectile=0.7, noise=0.0, mc=0.0, width=256, decay=True, eval_select=False)
TEACHER = dict(weight="none", temp=1.0, lr=3e-3, width=256, eta_g=0.01, warm=0.1, top=0.1, freeze=1.0, batch=256)
HEAD = dict(kind="student", teacher="T", alpha=1.0, eta=1.0, N=1, rho=0.5, zero=0.25, margin=0.01, start=0.0, lr=1e-3, width=256, freq=1,
            weight="none", temp=1.0, top=0.1, init=False, q="one", beta=3.0, data=0.0, batch=256, nq=2, z0="teacher")

def rebrac(b1, b2, **k):
    return dict(critic=dict(b2=b2, noise=0.2, lr=1e-3, decay=False, **k), heads=dict(main=dict(kind="det", alpha=b1, freq=2, lr=1e-3, sumdim=True)))

B12 = {"hopper-mixed": (.05, .5), "hopper-medium": (.01, .01), "hopper-expert": (.1, .1), "halfcheetah-mixed": (.01, .001),
       "halfcheetah-medium": (.001, .01), "halfcheetah-expert": (.01, .01)}
S = lambda **k: dict(kind="student", **k)
ARMS = {
    "bc": dict(critic=None, teachers=dict(T={}), heads=dict(bc=dict(kind="det", eta=0), bc10=dict(kind="det", eta=0, weight="filter", top=0.1), bc25=dict(kind="det", eta=0, weight="filter", top=0.25))),
    "td3bc": dict(critic=dict(ln=False, lr=3e-4, noise=0.2, decay=False), heads=dict(main=dict(kind="det", alpha=0.4, freq=2, lr=3e-4))),
    "rebrac": "rebrac",
    "rebracmc": "rebracmc",
    "iql": dict(critic=dict(kind="iql", ln=False, lr=3e-4, decay=False), heads=dict(main=dict(kind="det", eta=0, weight="iql", lr=3e-4))),
    # in-sample critics, many extractions at once
    "multi_iql": dict(critic=dict(kind="iql", mc=0.2), teachers=dict(T={}, W=dict(weight="adv")),
                  heads=dict(awr=dict(kind="det", eta=0, weight="adv"), Tq1=S(alpha=1), T8q0=S(alpha=1, eta=0, N=8), T8q1=S(alpha=1, N=8), Wq0=S(teacher="W", alpha=1, eta=0), Wq1=S(teacher="W", alpha=1, N=1))),
    "base": dict(critic=dict(kind="iql", mc=0.2, eval_select=True), teachers=dict(T={}),
                 heads=dict(awr=dict(kind="det", eta=0, weight="adv"), iqlw=dict(kind="det", eta=0, weight="iql"))),
    "m1": dict(critic=dict(kind="iql", mc=0.2), teachers=dict(W=dict(weight="adv", temp=0.5)),
               heads=dict(awr=dict(kind="det", eta=0, weight="adv", temp=0.5), awrq=dict(kind="det", eta=1, weight="adv", temp=0.5), iqlw=dict(kind="det", eta=0, weight="iql"))),
    # advantage-weighted teacher (in-sample values) and its one-pass student
    "awd": dict(critic=dict(kind="iql", mc=0.2), teachers=dict(W=dict(weight="adv", temp=0.5)),
                heads=dict(main=S(teacher="W"), n8=S(teacher="W", N=8, batch=128, nq=1))),
    "awz": dict(critic=dict(kind="iql", mc=0.2), teachers=dict(W=dict(weight="adv", temp=0.5)),
                heads=dict(z0=S(teacher="W", z0="data", weight="adv", temp=0.5, eta=0), z0q=S(teacher="W", z0="data", weight="adv", temp=0.5, eta=0.3))),
    # the same with temporal differences of the student, weights against its own actions, ReBRAC's penalty
    "awd_td": dict(critic=dict(mc=0.2, b2=0.01), teachers=dict(W=dict(weight="adv", temp=0.5)), heads=dict(main=S(teacher="W"))),
    "gate_td": dict(critic=dict(mc=0.2, b2=0.01), teachers=dict(W=dict(weight="gate")), heads=dict(main=S(teacher="W"))),
    "x": dict(critic=dict(kind="frozen"), teachers=dict(T=dict(freeze=0.0)), heads={}),
    "fql": dict(critic=dict(), teachers=dict(T={}), heads=dict(main=S(alpha=1.0))),
    "fql8": dict(critic=dict(), teachers=dict(T={}), heads=dict(main=S(alpha=1.0, N=8))),
}

# ------------------------------------------------------------------------------------------------------------------- data

def ring(kind, n=20000, std=0.05, seed=0):
    g = np.random.default_rng(seed); k = g.integers(0, 8, n); ang = 2 * np.pi * k / 8
    a = (0.8 * np.stack([np.cos(ang), np.sin(ang)], 1) + std * g.normal(size=(n, 2))).clip(-1, 1).astype(np.float32)
    r = (np.ones(n) if kind == "flat" else 0.5 + 0.5 * (k % 2)).astype(np.float32)
    z = np.zeros((n, 1), np.float32); o = np.ones(n, np.float32)
    return dict(obs=z, next_obs=z, act=a, rew=r, term=o, next_act=np.zeros_like(a), has_next=o * 0, ret=r, ep=np.arange(n))

class Data:
    def __init__(self, name):
        kind, *rest = name.split("-")
        if kind == "ring":  # ring-flat-0.05, ring-good-0.1: a bandit
            d = ring(rest[0], std=float(rest[1]))
        else:
            d = dict(np.load(f"{HERE}/data/{name}.npz"))
        self.mean, self.std = d["obs"].mean(0), d["obs"].std(0) + (1e-3 if not name.startswith("ring") else 1)
        G = np.zeros_like(d["rew"]); nxt = 0.0
        for i in range(len(G) - 1, -1, -1):  # discounted return; a truncated episode goes on at the mean of its last 100 rewards
            if i == len(G) - 1 or d["ep"][i] != d["ep"][i + 1]:
                j = max(i - 99, 0); same = d["ep"][j:i + 1] == d["ep"][i]
                nxt = 0.0 if d["term"][i] else d["rew"][j:i + 1][same].mean() / (1 - GAMMA)
            G[i] = nxt = d["rew"][i] + GAMMA * nxt
        self.c = 1 / np.abs(G).mean()  # reward scale: values near 1
        starts = np.r_[True, d["ep"][1:] != d["ep"][:-1]]
        rets = d["ret"][starts]
        self.iql_scale = 1000 / max(rets.max() - rets.min(), 1e-6) / self.c if len(rets) else 1.0
        self.ret_q = lambda top: float(np.quantile(d["ret"], 1 - top))
        cols = [(d["obs"] - self.mean) / self.std, (d["next_obs"] - self.mean) / self.std, d["act"], d["next_act"]] + \
               [x[:, None] for x in (d["rew"] * self.c, d["term"], d["has_next"], G * self.c, d["ret"])]
        self.S, self.A = d["obs"].shape[1], d["act"].shape[1]
        self.sizes = [c.shape[1] for c in cols]
        self.rows = th.tensor(np.concatenate(cols, 1), dtype=th.float32)

    def batch(self, n):
        return self.rows[th.randint(len(self.rows), (n,))].split(self.sizes, 1)

# --------------------------------------------------------------------------------------------------------------- training

def merge(default, over):
    unknown = set(over) - set(default) - {"sumdim"}
    assert not unknown, unknown
    return {**default, **over}

def adam(params, lr):
    return th.optim.Adam(params, lr=lr, fused=True)

class Run:
    def __init__(self, arm, data, steps):
        self.data, self.steps = data, steps
        Sd, Ad = data.S, data.A
        self.c = merge(CRITIC, arm["critic"]) if arm.get("critic") is not None else None
        self.opts, self.log = [], {}
        if self.c:
            w = self.c["width"]
            self.q = init_mlp([Sd + Ad, w, w, w, 1], self.c["n"]); self.qt = [p.detach().clone() for p in self.q]
            self.q_opt = self.opt(self.q, self.c["lr"], self.c["decay"])
            self.v = None
            if self.c["kind"] == "iql":
                self.v = init_mlp([Sd, w, w, w, 1]); self.v_opt = self.opt(self.v, self.c["lr"], self.c["decay"])
        self.teachers = {k: (Teacher(Ad, Sd, merge(TEACHER, v)["width"]), merge(TEACHER, v)) for k, v in arm.get("teachers", {}).items()}
        self.t_opts = {k: self.opt(t.params, c["lr"]) for k, (t, c) in self.teachers.items()}
        self.heads = {}
        for k, v in arm["heads"].items():
            h = merge(HEAD, v)
            ps = init_mlp([Sd + (Ad if h["kind"] == "student" else 0)] + [h["width"]] * 3 + [Ad])
            decay = not (self.c and not self.c["decay"])
            self.heads[k] = dict(c=h, ps=ps, ema=[p.detach().clone() for p in ps], opt=self.opt(ps, h["lr"], decay), ready=False)
        self.main = next(iter(self.heads.values()))

    def state(self):
        d = {"T:" + k: t.params for k, (t, _) in self.teachers.items()} | {"H:" + k: h["ps"] for k, h in self.heads.items()}
        if self.c:
            d |= {"q": self.q, "qt": self.qt} | ({"v": self.v} if self.v is not None else {})
        return {k: [p.detach().clone() for p in v] for k, v in d.items()}

    @th.no_grad()
    def load(self, d):
        """critics and teachers of an earlier run"""
        if self.c and "q" in d:
            if "v" in d and self.v is None:
                self.v = [p.clone() for p in d["v"]]
            for mine, k in ((self.q, "q"), (self.qt, "qt")):
                for p, x in zip(mine, d[k]): p.copy_(x)
        for k, (t, _) in self.teachers.items():
            if "T:" + k in d:
                for p, x in zip(t.params, d["T:" + k]): p.copy_(x)

    def opt(self, ps, lr, decay=True):
        o = adam(ps, lr); self.opts.append((o, lr, decay)); return o

    def Q(self, ps, s, a):
        return mlp(ps, th.cat([s, a], -1), F.relu, self.c["ln"])[..., 0]  # (n, B)

    def act(self, h, ps, s, z=None, half=True):
        if h["c"]["kind"] == "det":
            return th.tanh(mlp(ps, s, F.silu if h["c"]["weight"] != "x" else F.relu, half=half)[0])
        return one_pass(ps, z, s, half)

    def step_critic(self, b, k):
        s, s2, a, a2, r, d, hn, G, _ = b
        c, n = self.c, self.c["n"]
        with th.no_grad():
            if c["kind"] == "iql":
                nv = mlp(self.v, s2, F.relu, c["ln"])[0]
                pen = 0.0
            else:
                h = self.main
                z = th.randn_like(a)
                na = self.act(h, h["ema"], s2, z).clamp(-1, 1)
                if c["noise"]:
                    na = (na + (th.randn_like(a) * c["noise"]).clamp(-.5, .5)).clamp(-1, 1)
                q2 = self.Q(self.qt, s2, na)
                nv = (q2.mean(0) if c["agg"] == "mean" else q2.amin(0))[:, None]
                pen = c["b2"] * self.data.c * hn * (na - a2).square().sum(-1, keepdim=True) if c["b2"] else 0.0
            y = r + GAMMA * (1 - d) * (nv - pen)
            kappa = max(0.0, 1 - k / (c["mc"] * self.steps)) if c["mc"] else 0.0
            if kappa:
                y = (1 - kappa) * y + kappa * G
            if c["kind"] == "iql":
                qd = self.Q(self.qt, s, a).amin(0)
        if c["kind"] == "iql":
            v = mlp(self.v, s, F.relu, c["ln"])[0][:, 0]
            self.v_opt.zero_grad(); expectile_loss(qd - v, c["expectile"]).backward(); self.v_opt.step()
            self.adv = qd - v.detach()
        q = self.Q(self.q, s, a)
        loss = (q - y[:, 0]).square().mean(1).sum()
        self.q_opt.zero_grad(); loss.backward(); self.q_opt.step()
        th._foreach_lerp_(self.qt, [p.detach() for p in self.q], c["tau"])
        self.log["q"] = q.detach().mean()

    def advantage(self, s, a):
        """A(s, a) of in-sample values, or against the main head's own action"""
        if self.adv is not None:
            return self.adv
        with th.no_grad():
            if self.v is not None:
                self.adv = self.Q(self.qt, s, a).amin(0) - mlp(self.v, s, F.relu, self.c["ln"])[0][:, 0]
                return self.adv
            h = self.main
            p = self.act(h, h["ps"], s, th.randn_like(a)).clamp(-1, 1)
            q = self.Q(self.qt, th.cat([s, s]), th.cat([a, p])).amin(0)
            self.adv = q[:len(s)] - q[len(s):]
            return self.adv

    def weights(self, c, b, k):
        s, a = b[0], b[2]
        if c["weight"] == "filter":
            w = (b[8][:, 0] >= self.data.ret_q_cache.setdefault(c["top"], self.data.ret_q(c["top"]))).float()
            return w / w.mean().clamp(min=1e-3)
        if c["weight"] == "none":
            return None
        A = self.advantage(s, a)
        if c["weight"] == "iql":
            return th.exp(c["beta"] * A * self.data.iql_scale).clamp(max=100.0)
        return advantage_weight(A, c["temp"])

    def step_teacher(self, name, b, k):
        T, c = self.teachers[name]
        if k >= c["freeze"] * self.steps:
            return
        pr = k / (c["freeze"] * self.steps)
        n = c["batch"]
        s, a = b[0], b[2]
        w = None
        if c["weight"] in ("adv", "filter") and (k >= c["warm"] * self.steps or c["weight"] == "filter"):
            w = self.weights(c, b, k)
        elif c["weight"] == "gate" and k >= c["warm"] * self.steps:
            with th.no_grad():
                p = self.act(self.main, self.main["ps"], s, th.randn_like(a)).clamp(-1, 1)
                q = self.Q(self.qt, th.cat([s, s]), th.cat([a, p])).mean(0)
                w = value_gate(q[:len(s)], q[len(s):], c["eta_g"])
        loss = ict_loss(T, a[:n], s[:n], th.randn_like(a[:n]), th.rand(n), pr)
        loss = (loss if w is None else loss * w[:n]).mean()
        self.t_opts[name].zero_grad(); loss.backward(); self.t_opts[name].step()

    def step_head(self, h, b, k):
        c = h["c"]
        if k % c["freq"] or k < c["start"] * self.steps:
            return
        if not h["ready"]:
            h["ready"] = True
            if c["init"]:
                with th.no_grad():
                    for p, e, t in zip(h["ps"], h["ema"], self.teachers[c["teacher"]][0].snapshot()):
                        p.copy_(t); e.copy_(t)
        s, a = b[0], b[2]
        z = None
        if c["kind"] == "student":
            n = c["batch"]; s, a = s[:n], a[:n]
            z = th.randn_like(a)
            if c["zero"]:
                z[: int(c["zero"] * n)] = 0
            with th.no_grad():
                T = self.teachers[c["teacher"]][0]
                tp = T.folded()
                if c["N"] == 1:
                    target = one_pass(tp, z, s).clamp(-1, 1)
                else:
                    N = c["N"]
                    zn = math.sqrt(1 - c["rho"] ** 2) * z + c["rho"] * th.randn(N, *z.shape); zn[0] = z
                    sn = s.expand(N, *s.shape).reshape(N * len(s), -1)
                    cand = one_pass(tp, zn.view(N * len(s), -1), sn).clamp(-1, 1)
                    q = self.Q([p[:c["nq"]] for p in self.qt], sn, cand).amin(0).view(N, -1)
                    target, self.log["moved"] = best_neighbour(q, cand.view(N, len(s), -1), c["margin"] * q.abs().mean())
            x = one_pass(h["ps"], z, s)
            e = sq(x, target)
            if c["z0"] == "data":  # f(0, s) clones the data, weighted by the advantage; the rest keeps to the teacher's modes
                m = int(c["zero"] * n)
                w = self.weights(c, b, k)
                e = th.cat([sq(x[:m], a[:m]) * (1.0 if w is None else w[:m]), e[m:]])
            loss = c["alpha"] * e.mean()
            x = clamp(x)
        else:
            x = self.act(h, h["ps"], s)
            w = self.weights(c, b, k)
            e = (x - a).square().sum(-1) if c.get("sumdim") else sq(x, a)
            loss = c["alpha"] * (e if w is None else e * w).mean()
        if c["eta"]:
            i = int(k // c["freq"]) % self.c["n"]
            ps = [p.detach()[i:i + 1] for p in self.q] if c["q"] == "one" else [p.detach() for p in self.q]
            loss = loss + c["eta"] * q_improvement(self.Q(ps, s, x))
        h["opt"].zero_grad(); loss.backward(); h["opt"].step()
        th._foreach_lerp_(h["ema"], [p.detach() for p in h["ps"]], self.c["tau"] if self.c else 0.005)

    def train(self):
        self.data.ret_q_cache = {}
        for k in range(self.steps):
            lr = 0.5 * (1 + math.cos(math.pi * k / self.steps))
            for o, base, decay in self.opts:
                o.param_groups[0]["lr"] = base * lr if decay else base
            b = self.data.batch(256)
            self.adv = None
            if self.c and self.c["kind"] != "frozen":
                self.step_critic(b, k)
            for t in self.teachers:
                self.step_teacher(t, b, k)
            for h in self.heads.values():
                self.step_head(h, b, k)

    @th.no_grad()
    def policies(self):
        """name -> function (standardised s, z) -> action"""
        out = {}
        for k, (T, c) in self.teachers.items():
            tp = T.snapshot(); out[k] = (lambda s, z, tp=tp: one_pass(tp, z, s, False).clamp(-1, 1), True)
            if self.c and self.c["eval_select"]:
                def sel(s, z, tp=tp):
                    zn = 0.5 * th.randn(20, *z.shape); zn[0] = 0
                    sn = s.expand(20, *s.shape).reshape(-1, s.shape[1]); cand = one_pass(tp, zn.view(-1, z.shape[1]), sn).clamp(-1, 1)
                    i = self.Q(self.qt, sn, cand).amin(0).view(20, -1).argmax(0)
                    return cand.view(20, *z.shape)[i, th.arange(len(s))]
                out[k + "+best20"] = (sel, False)
        for k, h in self.heads.items():
            out[k] = (lambda s, z, h=h: self.act(h, h["ps"], s, z, False).clamp(-1, 1), h["c"]["kind"] == "student")
        return out

# ------------------------------------------------------------------------------------------------------------- evaluation

@th.no_grad()
def rollout(env_name, data, policy, mode, episodes, seed):
    import gymnasium as gym
    envs = [gym.make(ENV[env_name]).unwrapped for _ in range(episodes)]
    obs = np.stack([e.reset(seed=10_000 * (seed + 1) + i)[0] for i, e in enumerate(envs)])
    g = th.Generator().manual_seed(seed)
    fixed = th.randn(1, data.A, generator=g)
    total, alive = np.zeros(episodes), np.ones(episodes, bool)
    for _ in range(1000):
        idx = np.flatnonzero(alive)
        if len(idx) == 0:
            break
        s = th.tensor((obs[idx] - data.mean) / data.std, dtype=th.float32)
        z = {"det": th.zeros(len(idx), data.A), "fixed": fixed.expand(len(idx), -1), "sample": th.randn(len(idx), data.A, generator=g)}[mode]
        act = policy(s, z).numpy()
        for j, i in enumerate(idx):
            o, r, term, _, _ = envs[i].step(act[j]); obs[i] = o; total[i] += r
            if term:
                alive[i] = False
    lo, hi = REF[env_name]
    return 100 * (total - lo) / (hi - lo)

@th.no_grad()
def ring_score(policy, std, data, run):
    ang = 2 * math.pi * th.arange(8) / 8
    modes = 0.8 * th.stack([ang.cos(), ang.sin()], 1)
    z = th.randn(4000, 2); x = policy(th.zeros(4000, 1), z)
    dist, which = th.cdist(x, modes).min(1)
    near = dist < max(3 * std, 0.15)
    x0 = policy(th.zeros(1, 1), th.zeros(1, 2)); d0, w0 = th.cdist(x0, modes).min(1)
    return dict(near=near.float().mean().item(), modes=int(sum((near & (which == m)).float().mean() > 0.02 for m in range(8))),
                good=(near & (which % 2 == 1)).float().mean().item(), det_dist=d0.item(), det_good=bool(w0.item() % 2))

def main():
    p = argparse.ArgumentParser()
    p.add_argument("--arm", required=True); p.add_argument("--dataset", required=True)
    p.add_argument("--steps", type=int, default=30000); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--episodes", type=int, default=10); p.add_argument("--set", nargs="*", default=[]); p.add_argument("--tag", default="")
    p.add_argument("--load", nargs="*", default=[]); p.add_argument("--save", default="")
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--modes", default="det,sample"); p.add_argument("--out", default=f"{HERE}/runs.jsonl")
    a = p.parse_args()
    th.set_num_threads(1)
    arm = ARMS[a.arm]
    if isinstance(arm, str):
        arm = rebrac(*B12[a.dataset], **({"mc": 0.2} if arm == "rebracmc" else {}))
    arm = copy.deepcopy(arm)
    if a.width:
        for part in ([arm["critic"]] if arm.get("critic") is not None else []) + list(arm.get("teachers", {}).values()) + list(arm["heads"].values()):
            part["width"] = a.width
    for kv in a.set:
        path, val = kv.split("=", 1); *parents, leaf = path.split("."); node = arm
        for q in parents:
            node = node.setdefault(q, {})
        try: val = json.loads(val)
        except ValueError: pass
        if val == "DEL": node.pop(leaf, None)
        else: node[leaf] = val
    key = [a.arm + (":" + a.tag if a.tag else "") + (f"/w{a.width}" if a.width else ""), a.dataset, a.steps, a.seed]
    if os.path.exists(a.out) and any(json.loads(l)["key"] == key for l in open(a.out)):
        print("exists", key); return
    th.manual_seed(a.seed)
    data = Data(a.dataset)
    run = Run(arm, data, a.steps)
    for f in a.load:
        run.load(th.load(f"{HERE}/ckpt/{f}.pt"))
    t = time.process_time(); run.train(); cpu = time.process_time() - t
    if a.save:
        th.save(run.state(), f"{HERE}/ckpt/{a.save}.pt")
    res = {}
    for name, (pol, stochastic) in run.policies().items():
        if a.dataset.startswith("ring"):
            res[name] = ring_score(pol, float(a.dataset.split("-")[2]), data, run); continue
        modes = a.modes.split(",") if stochastic else ["det"]
        res[name] = {}
        for m in modes:
            s = rollout(a.dataset.split("-")[0], data, pol, m, a.episodes, a.seed)
            res[name][m] = round(float(s.mean()), 1); res[name][m + "_std"] = round(float(s.std()), 1)
    line = dict(key=key, arm=arm, res=res, q=float(run.log.get("q", th.tensor(0.)) / data.c), moved=float(run.log.get("moved", 0.)), cpu_ms=round(1e3 * cpu / a.steps, 2), episodes=a.episodes, when=time.strftime("%H:%M"))
    with open(a.out, "a") as f:
        f.write(json.dumps(line) + "\n")
    print(key, {k: {m: v for m, v in r.items() if not m.endswith("_std")} for k, r in res.items()}, "q", round(line["q"], 1), "ms", line["cpu_ms"], "moved", round(line["moved"], 2))

if __name__ == "__main__":
    main()
