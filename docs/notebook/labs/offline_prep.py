"""Read $MINARI_DATASETS_PATH zoo sets once into data/<env>-<level>.npz (rows in order, episodes whole)."""

import os

import h5py
import numpy as np

REF = {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0)}
for env in REF:
    for lev in ("medium", "expert", "mixed"):
        out = {k: [] for k in "obs next_obs act rew term next_act has_next rtg ep ret".split()}
        with h5py.File(f"{os.environ['MINARI_DATASETS_PATH']}/zoo/{env}/{lev}-v0/data/main_data.hdf5") as f:
            n = len(f)
            for e in range(n):
                g = f[f"episode_{e}"]
                o = g["observations"][()]
                a = g["actions"][()]
                r = g["rewards"][()]
                t = g["terminations"][()]
                tr = g["truncations"][()]
                L = len(a)
                assert o.shape[0] == L + 1
                na = np.zeros_like(a)
                na[:-1] = a[1:]
                hn = np.ones(L)
                hn[-1] = 0
                rtg = np.cumsum(r[::-1])[::-1]
                for k, v in zip(out, (o[:-1], o[1:], a, r, t, na, hn, rtg, np.full(L, e), np.full(L, r.sum()))):
                    out[k].append(np.asarray(v, dtype=np.float32))
        d = {k: np.concatenate(v) for k, v in out.items()}
        np.savez(f"data/{env}-{lev}.npz", **d)
        lo, hi = REF[env]
        rets = np.array([x[0] for x in out["ret"]])
        s = 100 * (rets - lo) / (hi - lo)
        lens = np.array([len(x) for x in out["ret"]])
        print(
            env,
            lev,
            len(rets),
            d["obs"].shape,
            "act",
            np.abs(d["act"]).max(),
            "frac>.99",
            (np.abs(d["act"]) > 0.99).mean().round(3),
            "score mean",
            s.mean().round(1),
            "quantiles",
            np.percentile(s, [0, 25, 50, 75, 90, 95, 100]).round(1),
            "step-weighted q",
            np.percentile(100 * (d["ret"] - lo) / (hi - lo), [25, 50, 75, 90]).round(1),
            "r mean",
            d["rew"].mean().round(2),
            "terms",
            d["term"].sum(),
        )
