"""
What is different beside a precise teacher and one that scatters (hopper/mixed); models of one_pass.py, and a ConsistencyBC.

    python docs/notebook/labs/beside_a_teacher.py clone ict.zip
    python docs/notebook/labs/beside_a_teacher.py values model.zip
    python docs/notebook/labs/beside_a_teacher.py spread ict.zip model.zip
    python docs/notebook/labs/beside_a_teacher.py choice ict.zip model.zip
    python docs/notebook/labs/beside_a_teacher.py horizon

"values": returns and what the critics say of them. "spread": of actions over the noise. "choice": the critics choose among the
actions of either teacher. "horizon": fitted Q evaluation by target_share, beside the discounted return.
"""

import argparse
from functools import partial

import numpy as np
import torch as th
from best_of import mean_return
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import CPQL, ConsistencyBC, fitted_q_evaluation, make_env, open_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["clone", "values", "spread", "choice", "horizon"])
parser.add_argument("files", nargs="*")
args = parser.parse_args()
th.set_num_threads(1)
DATA, DIM = "zoo/hopper/mixed-v0", 3
source = open_dataset(DATA)


def drawn(network, obs, n):
    return network.model.sample(th.randn(1, n * len(obs), DIM), network.features(obs).repeat(n, 1)).view(n, len(obs), DIM)


def roll(act, episodes, told=lambda obs, scaled: 0.0):
    """Returns, discounted returns of every state, and what is told of every state; first states apart."""
    env, returns, all_g, all_q, starts = make_env(source.make_env()), [], [], [], []
    for seed in range(episodes):
        (obs, _), rewards, q, over = env.reset(seed=seed), [], [], False
        while not over:
            with th.no_grad():
                action, scaled = act(obs)
                q.append(told(obs, scaled))
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            over = terminated or truncated
        g = [0.0 if terminated else q[-1]]
        for reward in reversed(rewards):
            g.insert(0, reward + 0.99 * g[0])
        returns.append(sum(rewards))
        starts.append((g[0], q[0]))
        all_g += g[:-1]
        all_q += q
    return np.mean(returns), np.mean(all_g), np.mean(all_q), *np.mean(starts, axis=0)


if args.what == "clone":
    options = {"bc_loss": "ict", "compile": True, "precision": "bf16", "seed": 0, "device": "cpu"}
    ConsistencyBC.from_dataset(DATA, **options).pretrain(50_000).save(args.files[0])
elif args.what == "values":
    model = CPQL.load(args.files[0])
    actor, critic = model.policy.actor, model.policy.critic

    def value(obs, scaled):
        return float(critic.q_networks(critic.features(th.as_tensor(obs[None], dtype=th.float32)), scaled).min())

    for name, noise in (("f(0)", th.zeros), ("f(z)", th.randn)):

        def act(obs, noise=noise):
            features = actor.features(th.as_tensor(obs[None], dtype=th.float32))
            scaled = actor.model.denoise(noise(1, 1, DIM), features).clamp(-1, 1)
            return model.policy.unscale_action(scaled.numpy())[0], scaled

        print(name, "return {:.0f}, G {:.0f}, Q {:.0f}, at the starts {:.0f} and {:.0f}".format(*roll(act, 6, value)), flush=True)
elif args.what == "horizon":
    model = CPQL.from_dataset(DATA, seed=0, dataset_kwargs={"heldout_fraction": 0.1}, device="cpu", compile=True).pretrain(6_000)
    print("discounted return {3:.0f}".format(*roll(lambda obs: (model.predict(obs, deterministic=True)[0], None), 10)))
    for share in (0.01, 0.05):
        print(share, round(fitted_q_evaluation(model, 5_000, target_share=share), 1), flush=True)
else:
    ict, model = ConsistencyBC.load(args.files[0]), CPQL.load(args.files[1])
    networks = {"ConsistencyBC": ict.policy.actor, "T": model.policy.teacher, "f": model.policy.actor}
    if args.what == "spread":
        th.manual_seed(0)
        np.random.seed(0)
        ict.load_dataset(DATA)
        batch = next(ict.batches(1, 1024))
        for name, network in networks.items():
            with th.no_grad():
                actions = drawn(network, batch.observations, 64).clamp(-1, 1)
            print(f"{name}: sd {actions.std(0).mean():.2f}, beyond 0.97 {(actions.abs() > 0.97).float().mean():.2f}")
    else:
        env = make_vec_env(lambda: make_env(source.make_env()), n_envs=20)
        for name in ("ConsistencyBC", "T"):
            for n in (1, 8):
                score = mean_return(model, partial(drawn, networks[name], n=n), env)
                print(f"best of {n} of {name}: {score:.0f}", flush=True)
