"""
How much of the data's spread the denoiser of CPQL's "distill" keeps, by the levels at which it is asked, and what the critics
make of it.

    python docs/notebook/labs/dispersion.py exact
    python docs/notebook/labs/dispersion.py train zoo/hopper/mixed-v0 denoiser.pt
    python docs/notebook/labs/dispersion.py spread zoo/hopper/mixed-v0 denoiser.pt
    python docs/notebook/labs/dispersion.py choice zoo/hopper/mixed-v0 denoiser.pt model.zip

"exact": the share of the standard deviation that is left of normally distributed data (closed form). "train": one denoiser at
all levels of all ladders. "spread": of its actions over z, by ladder. "choice": the critics of a model of one_pass.py choose
among its actions.
"""

import argparse
import math
from functools import partial

import numpy as np
import torch as th
from best_of import mean_return
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import CPQL, make_env, open_dataset
from sb3_consistency.generative.denoising import DenoisingModel

#: levels, and what the noise at the second level is multiplied by
LADDERS = {
    "as it is": ((80, 0.7, 0.35, 0.175), 1.0),
    "as it is, wider start": ((80, 0.7, 0.35, 0.175), 1.25),
    "as it is, start 1.5": ((80, 0.7, 0.35, 0.175), 1.5),
    "as it is, start 2": ((80, 0.7, 0.35, 0.175), 2.0),
    "a fifth, lower": ((80, 0.7, 0.35, 0.175, 0.0875), 1.0),
    "a fifth, lower, start 1.25": ((80, 0.7, 0.35, 0.175, 0.0875), 1.25),
    "a fifth, higher": ((80, 1.4, 0.7, 0.35, 0.175), 1.0),
    "eight": ((80, 2.8, 1.4, 0.7, 0.35, 0.175, 0.0875, 0.04375), 1.0),
    "fine": ((80, 20, 5, *(2.8 * 2 ** (-i / 2) for i in range(1, 14))), 1.0),
}
UNION = tuple(sorted({round(level, 6) for levels, _ in LADDERS.values() for level in levels}, reverse=True))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["exact", "train", "spread", "choice"])
parser.add_argument("files", nargs="*")
parser.add_argument("--steps", type=int, default=50_000)
parser.add_argument("--ladders", nargs="+", default=list(LADDERS))
parser.add_argument("--best-of", type=int, nargs="+", default=[1, 8])
args = parser.parse_args()
th.set_num_threads(1)


def down(denoise, z, levels, wider):
    """Euler's steps down the ladder; at the second level the noise is multiplied by ``wider``."""
    x = levels[0] * z
    for i, (sigma, lower) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True)):
        clean = denoise(x, sigma)
        x = clean + (wider if i == 0 else 1.0) * lower / sigma * (x - clean)
    return x


if args.what == "exact":
    for name, (levels, wider) in LADDERS.items():
        kept = []
        for std in (0.05, 0.1, 0.2, 0.3, 0.4):
            kept.append(down(lambda x, sigma, std=std: std**2 / (std**2 + sigma**2) * x, 1.0, levels, wider) / std)
        print(f"{name}: " + ", ".join(f"{share:.2f}" for share in kept))
    raise SystemExit

DenoisingModel.levels = UNION
data, file = args.files[:2]
model = CPQL.from_dataset(data, bc_loss="distill", seed=0, device="cpu")
teacher = model.policy.teacher
dim = model.action_space.shape[0]

if args.what == "train":
    optimizer = th.optim.Adam(teacher.parameters(), 3e-4)
    for step, batch in enumerate(model.batches(args.steps, 256)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        loss = teacher.bc_loss(teacher.features(batch.observations), batch.actions, None, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10_000 == 0:
            print(step, float(loss.detach()), flush=True)
    th.save(teacher.state_dict(), file)
    raise SystemExit

teacher.load_state_dict(th.load(file))


def drawn(obs, n, levels, wider):
    features = teacher.features(obs).repeat(n, 1)

    def denoise(x, sigma):
        return teacher.model(x, th.full((1,), float(sigma)), features).clamp(-1, 1)

    return down(denoise, th.randn(n * len(obs), dim), levels, wider).clamp(-1, 1).view(n, len(obs), dim)


if args.what == "spread":
    np.random.seed(0)
    batch = next(model.batches(1, 1024))
    print(f"data: beyond 0.97 {(batch.actions.abs() > 0.97).float().mean():.2f}")
    for name in args.ladders:
        th.manual_seed(0)
        with th.no_grad():
            actions = drawn(batch.observations, 64, *LADDERS[name])
            # energy distance of the conditional distributions, up to a constant of the data: lower is better (a proper score)
            to_data = (actions - batch.actions).norm(dim=-1).mean()
            among = (actions[:32] - actions[32:]).norm(dim=-1).mean()
        spread, bounds = actions.std(0).mean(), (actions.abs() > 0.97).float().mean()
        print(f"{name}: sd {spread:.3f}, beyond 0.97 {bounds:.2f}, energy score {to_data - among / 2:.4f}", flush=True)
else:
    judge = CPQL.load(args.files[2])
    env = make_vec_env(lambda: make_env(open_dataset(data).make_env()), n_envs=20)
    for name in args.ladders:
        for n in args.best_of:
            th.manual_seed(0)
            score = mean_return(judge, partial(drawn, n=n, levels=LADDERS[name][0], wider=LADDERS[name][1]), env)
            print(f"{name}, best of {n}: {score:.0f}", flush=True)
