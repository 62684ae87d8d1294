"""Cheap staged study: advantages of all rows once (cached critics, or Monte-Carlo), then stacked weighted clones.

stage.py DATASET STEPS SEED CKPT|none CONFIG...   CONFIG = source:temp, e.g. none:1 iql:0.5 mc:0.5 ret:0.1
Deterministic heads of all configs are trained as one stacked network, and so are "ict" teachers.
"""
import json, math, sys, time
import torch as th, torch.nn.functional as F
import lab
from lab import mlp, init_mlp, adam
th.set_num_threads(1)

def cos(k, K): return 0.5 * (1 + math.cos(math.pi * k / K))

@th.no_grad()
def chunks(f, *xs):
    return th.cat([f(*c) for c in zip(*[x.split(4096) for x in xs])])

def mc_advantage(data, steps, W, tau=0.7):
    s, G = data.rows[:, :data.S], data.rows[:, -2]
    v = init_mlp([data.S, W, W, W, 1]); o = adam(v, 1e-3)
    for k in range(steps):
        o.param_groups[0]["lr"] = 1e-3 * cos(k, steps)
        i = th.randint(len(s), (256,))
        o.zero_grad(); lab.expectile_loss(G[i] - mlp(v, s[i], F.relu, True)[0][:, 0], tau).backward(); o.step()
    return G - chunks(lambda s: mlp(v, s, F.relu, True)[0][:, 0], s)

def critic_advantage(data, ck):
    q = lambda s, a: mlp(ck["qt"], th.cat([s, a], 1), F.relu, True)[..., 0].amin(0) - mlp(ck["v"], s, F.relu, True)[0][:, 0]
    s, _, a = data.rows.split(data.sizes, 1)[:3]
    return chunks(q, s, a)

class StackTeacher:
    def __init__(self, n, A, S, W):
        self.A = A; self.emb = init_mlp([16, 32, 16], n); self.net = init_mlp([A + 16 + S, W, W, W, A], n); self.params = self.emb + self.net
    def f(self, x, sigma, s):
        cs, co, ci = (c.unsqueeze(-1) for c in lab.scalings(sigma))
        t = sigma.log().unsqueeze(-1) * lab.FREQ
        e = mlp(self.emb, th.cat([t.sin(), t.cos()], -1), F.silu, half=False)
        n = len(e)
        return cs * x + co * mlp(self.net, th.cat([(ci * x).expand(n, -1, -1), e, s.expand(n, -1, -1)], -1), F.silu)
    @th.no_grad()
    def folded(self, j):
        t = lab.Teacher.__new__(lab.Teacher); t.A = self.A
        t.emb = [p[j:j + 1] for p in self.emb]; t.net = [p[j:j + 1] for p in self.net]
        return t.snapshot()

def main():
    ds, steps, seed, ckpt, *configs = sys.argv[1:]
    steps, seed = int(steps), int(seed)
    th.manual_seed(seed); data = lab.Data(ds); W = 128; t0 = time.process_time()
    ck = th.load(f"ckpt/{ckpt}.pt") if ckpt != "none" else None
    sources = {c.split(":")[0] for c in configs}
    adv = {}
    if "iql" in sources: adv["iql"] = critic_advantage(data, ck)
    if "mc" in sources: adv["mc"] = mc_advantage(data, 4000, W)
    ws = []
    for c in configs:
        src, temp = c.split(":")
        if src == "none": ws.append(th.ones(len(data.rows)))
        elif src == "ret":  # top share of the rows by episode return
            w = (data.rows[:, -1] >= data.ret_q(float(temp))).float(); ws.append(w / w.mean())
        else: ws.append(lab.advantage_weight(adv[src], float(temp)))
    w = th.stack(ws); n = len(w)
    ess = (w.sum(1) ** 2 / w.square().sum(1) / w.shape[1])
    print(ds, "effective share", dict(zip(configs, ess.tolist())), "cpu", time.process_time() - t0, flush=True)
    s, _, a = data.rows.split(data.sizes, 1)[:3]
    out = open("stage.jsonl", "a")
    def report(name, pol, mode):
        r = lab.rollout(ds.split("-")[0], data, pol, mode, 10, seed)
        line = dict(dataset=ds, steps=steps, seed=seed, ckpt=ckpt, name=name, mode=mode, score=round(float(r.mean()), 1), sd=round(float(r.std()), 1), cpu=round(time.process_time() - t0), when=time.strftime("%H:%M"))
        out.write(json.dumps(line) + "\n"); out.flush(); print(line, flush=True)
    det = init_mlp([data.S, W, W, W, data.A], n); o = adam(det, 1e-3)
    for k in range(steps):
        o.param_groups[0]["lr"] = 1e-3 * cos(k, steps); i = th.randint(len(s), (256,))
        x = th.tanh(mlp(det, s[i], F.silu)); o.zero_grad(); (w[:, i] * lab.sq(x, a[i])).mean(1).sum().backward(); o.step()
    for j, c in enumerate(configs):
        report("det " + c, lambda s, z: th.tanh(mlp([p.detach()[j:j + 1] for p in det], s, F.silu, half=False)[0]), "det")
    T = StackTeacher(n, data.A, data.S, W); o = adam(T.params, 3e-3)
    for k in range(steps):
        o.param_groups[0]["lr"] = 3e-3 * cos(k, steps); i = th.randint(len(s), (256,))
        loss = lab.ict_loss(T, a[i], s[i], th.randn_like(a[i]), th.rand(256), k / steps)
        o.zero_grad(); (w[:, i] * loss).mean(1).sum().backward(); o.step()
    for j, c in enumerate(configs):
        tp = T.folded(j)
        report("ict " + c, lambda s, z: lab.one_pass(tp, z, s, False).clamp(-1, 1), "det")
        report("ict " + c, lambda s, z: lab.one_pass(tp, z, s, False).clamp(-1, 1), "sample")
    th.save(dict(T=[T.folded(j) for j in range(n)], det=[p.detach() for p in det], configs=configs), f"ckpt/stage-{ds}-{seed}.pt")
main()
