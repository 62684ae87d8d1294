"""
What chunks cost, and what a backbone makes of them.

    python docs/notebook/labs/chunks.py cost     CPU time of a gradient step and of a plan by backbone, of a step by executed_steps
    python docs/notebook/labs/chunks.py score    distance of sampled chunks from demonstrations that go two ways, by backbone
"""

import argparse
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


def cost():
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
            model.executed_steps, memory = executed_steps, [None]

            def act(model=model, memory=memory):
                memory[0] = model.predict(observation, memory[0], np.array([False]), deterministic=True)[1]

            cells.append(f"{1e6 * best(act, 128):.0f} us")
        print(f"| {executed_steps} | {' | '.join(cells)} |", flush=True)


def two_ways(n, seed):
    """Chunks (n, H, 2) that pass an obstacle above or below, as in examples/04_planner_modes.py."""
    rng = np.random.default_rng(seed)
    angle = rng.choice([1, -1], size=(n, 1)) * np.linspace(1.1, -1.1, HORIZON) + 0.15 * rng.standard_normal((n, 1))
    return 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=-1) + 0.05 * rng.standard_normal((n, HORIZON, 2))


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, 0 for equal distributions."""
    a, b = (th.as_tensor(x.reshape(len(x), -1), dtype=th.float64) for x in (a, b))
    within = sum(th.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(2 * th.cdist(a, b).mean() - within)


def score(steps, batch_size):
    chunks = two_ways(1000, seed=0)
    data = {
        # every chunk is an episode that begins in the same place, and one is drawn whole
        "observations": np.tile(np.arange(HORIZON, dtype=np.float32)[:, None] / HORIZON, (len(chunks), 1)),
        "actions": chunks.reshape(-1, 2).astype(np.float32),
        "truncations": np.tile(np.arange(HORIZON) == HORIZON - 1, len(chunks)),
        "action_space": spaces.Box(-1, 1, (2,), np.float32),
    }
    fresh = two_ways(1000, seed=1)
    print(f"demonstrations: {energy_distance(two_ways(1000, seed=2), fresh):.4f}, their mean: ", end="")
    print(f"{energy_distance(np.repeat(fresh.mean(axis=0)[None], 1000, axis=0), fresh):.2f}", flush=True)
    resnet, unet = {"network": "ln_resnet"}, {"network": "unet", "net_arch": [32, 64]}
    for kwargs, rate in (({}, 3e-3), (resnet, 3e-3), (resnet, 3e-4), (unet, 3e-3)):
        model = ConsistencyBC(
            "MlpPolicy",
            learning_rate=rate,
            dataset=data,
            horizon=HORIZON,
            pad=False,
            batch_size=batch_size,
            seed=0,
            policy_kwargs=kwargs,
        )
        model.load_dataset(data)
        began = time.process_time()
        model.learn(steps)
        seconds = time.process_time() - began
        sampled = model.plan(np.zeros((1000, 1), np.float32))
        print(f"{kwargs}, learning rate {rate}: {energy_distance(sampled, fresh):.4f}, {seconds:.0f} s", flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["cost", "score"])
parser.add_argument("--steps", type=int, default=1000, help="gradient steps of a score")
parser.add_argument("--batch-size", type=int, default=128)
args = parser.parse_args()
th.set_num_threads(1)
if args.what == "cost":
    cost()
else:
    score(args.steps, args.batch_size)
