"""
What CPQL does in its first steps online after an offline phase; the phase is trained once, for any number of arms.

    python docs/notebook/labs/going_online.py pretrain zoo/halfcheetah/medium-v0 model.zip
    python docs/notebook/labs/going_online.py online zoo/halfcheetah/medium-v0 model.zip --rate 3e-5
    python docs/notebook/labs/going_online.py online zoo/halfcheetah/medium-v0 model.zip --alpha 0.1 --steps 20000
    python docs/notebook/labs/going_online.py online zoo/halfcheetah/medium-v0 model.zip --frozen 2000 --steps 10000
"""

import argparse
import ast
from types import SimpleNamespace

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import CPQL, open_dataset
from sb3_consistency.benchmark.runs import evaluate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("phase", choices=["pretrain", "online"])
parser.add_argument("dataset")
parser.add_argument("model")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, help="20,000 offline, 8,000 online")
parser.add_argument("--rate", type=float, help="the actor's learning rate online")
parser.add_argument("--alpha", type=float, help="what the weight of cloning falls to, in a straight line over the steps online")
parser.add_argument("--options", type=ast.literal_eval, default={}, help="others of the model, as a dict")
parser.add_argument("--warm", type=int, default=0, help="steps online before --alpha and --options")
parser.add_argument("--frozen", type=int, default=0, help="steps online before the first gradient step (WSRL's warm-up)")
args = parser.parse_args()
n_steps = args.steps or (20_000 if args.phase == "pretrain" else 8_000)
th.set_num_threads(1)
source = open_dataset(args.dataset)
env, eval_env = make_vec_env(source.make_env, seed=args.seed), make_vec_env(source.make_env, n_envs=20)

# what evaluate() looks at of a job
job = SimpleNamespace(seed=args.seed, episodes=20)


class Curve(BaseCallback):
    def __init__(self, every):
        super().__init__()
        self.every = every

    def _on_step(self):
        if self.n_calls % self.every == 0:
            logged = self.model.logger.name_to_value.items()
            told = {name.removeprefix("train/"): round(float(value), 4) for name, value in logged if name.startswith("train/")}
            print(self.n_calls, round(evaluate(self.model, eval_env, job, True).value), told, flush=True)
        return True


class Arm(BaseCallback):
    """From --warm on: the options, and the weight of cloning that falls."""

    def _on_step(self):
        if self.n_calls == args.frozen + 1:
            self.model.gradient_steps = 1
        if self.n_calls == args.warm + 1:
            for name, value in args.options.items():
                setattr(self.model, name, value)
            if args.alpha is not None:
                begin, steps = self.model._n_updates, n_steps - args.warm
                self.model.alpha = lambda step: 1 + (args.alpha - 1) * min((step - begin) / steps, 1)
        return True


if args.phase == "pretrain":
    model = CPQL.from_dataset(args.dataset, env=env, seed=args.seed, compile=True)
    model.pretrain(n_steps, callback=Curve(2_000)).save(args.model)
else:
    model = CPQL.load(args.model, env=env)
    model.load_dataset(args.dataset)
    model.actor_learning_rate = args.rate
    model.gradient_steps = 0
    model.learn(n_steps, callback=[Arm(), Curve(1_000)], reset_num_timesteps=False)
print("at the end", round(evaluate(model, eval_env, job, True).value))
