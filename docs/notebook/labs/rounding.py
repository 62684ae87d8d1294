"""
Whether bfloat16 can tell the candidates of a state apart: a model of one_pass.py (CPQL with "distill").

    python docs/notebook/labs/rounding.py zoo/hopper/mixed-v0 model.zip
"""

import sys

import numpy as np
import torch as th

from sb3_consistency import CPQL

N = 8
th.set_num_threads(1)
th.manual_seed(0)
np.random.seed(0)
model = CPQL.load(sys.argv[2])
model.load_dataset(sys.argv[1])
obs = next(model.batches(1, 1024)).observations
teacher, actor, critic = model.policy.teacher, model.policy.actor, model.policy.critic
for name, network in (("T", teacher), ("f", actor)):
    with th.no_grad():
        actions = network.model.sample(th.randn(1, N * len(obs), *network.model.event_shape), network.features(obs).repeat(N, 1))
        features = critic.features(obs).repeat(N, 1)
        exact = critic.q_networks(features, actions)
        with th.autocast("cpu", dtype=th.bfloat16):
            rounded = critic.q_networks(features, actions)
    first, second = (q - q.mean(0) for q in exact.T.reshape(2, N, -1))
    exact, rounded = (q.amin(1).view(N, -1) for q in (exact, rounded))
    error = (rounded - exact) - (rounded - exact).mean(0)
    print(
        f"{name}: Q {exact.mean():.0f}, sd over {N} candidates {exact.std(0).mean():.3f}, of bfloat16's error "
        f"{error.square().mean().sqrt():.3f}, the same best {(exact.argmax(0) == rounded.argmax(0)).float().mean():.2f}, "
        f"correlation of the critics {th.corrcoef(th.stack([first.flatten(), second.flatten()]))[0, 1]:.2f}"
    )
