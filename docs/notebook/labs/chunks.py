"""
What chunks cost: CPU time of a gradient step and of a plan by backbone, of an environment step by ``executed_steps``.

    python docs/notebook/labs/chunks.py
"""

import time

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_consistency import ConsistencyBC

OBS_DIM, ACTION_DIM, HORIZON, N = 28, 5, 16, 2000  # sizes of OGBench's cube-single


def best(call, n):
    """CPU seconds of a call: the best mean of five times n."""
    times = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(n):
            call()
        times.append((time.process_time() - began) / n)
    return min(times)


def make(horizon, **kwargs):
    rng = np.random.default_rng(0)
    data = {
        "observations": rng.normal(size=(N, OBS_DIM)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, ACTION_DIM)).astype(np.float32),
        "truncations": np.arange(N) % 500 == 499,
        "action_space": spaces.Box(-1, 1, (ACTION_DIM,), np.float32),
    }
    model = ConsistencyBC("MlpPolicy", dataset=data, horizon=horizon, seed=0, device="cpu", **kwargs)
    model.load_dataset(data)
    return model.pretrain(3)


th.set_num_threads(1)
observation = np.zeros(OBS_DIM, np.float32)
print("| horizon | network | parameters | gradient step, batch 256 | plan |\n|---|---|---|---|---|")
for horizon, network in ((1, "mlp"), (HORIZON, "mlp"), (HORIZON, "ln_resnet"), (HORIZON, "unet")):
    model = make(horizon, policy_kwargs={"network": network})
    step, plan = best(lambda m=model: m.train(1, 256), 4), best(lambda m=model: m.plan(observation, deterministic=True), 20)
    n_parameters = sum(p.numel() for p in model.actor.parameters())
    print(f"| {horizon} | {network} | {n_parameters:,} | {1e3 * step:.0f} ms | {1e6 * plan:.0f} us |", flush=True)

print("\n| executed_steps | history 1 | history 2 |\n|---|---|---|")
models = [make(HORIZON, history=history) for history in (1, 2)]
for executed_steps in (1, 2, 4, 8, 16):
    cells = []
    for model in models:
        model.executed_steps, state = executed_steps, None

        def act(model=model):
            global state
            state = model.predict(observation, state, np.array([False]), deterministic=True)[1]

        cells.append(f"{1e6 * best(act, 128):.0f} us")
    print(f"| {executed_steps} | {' | '.join(cells)} |", flush=True)
