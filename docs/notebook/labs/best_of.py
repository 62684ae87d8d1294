"""The best by the critics of several actions, as a policy for evaluate_policy; the scripts beside it share it."""

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy


def values(critic, obs, actions):
    """The lower of the critics, (N, B), at scaled actions (N, B, A) of states (B, O)."""
    n, b, a = actions.shape
    return critic.q_networks(critic.features(obs).repeat(n, 1), actions.reshape(n * b, a)).amin(1).view(n, b)


class BestOf:
    """``draw(obs)`` tells scaled actions (N, B, A), of which the critics of ``model`` choose."""

    def __init__(self, model, draw):
        self.model, self.draw = model, draw

    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        with th.no_grad():
            obs = th.as_tensor(obs, dtype=th.float32)
            actions = self.draw(obs)
            best = values(self.model.policy.critic, obs, actions).argmax(0)
            chosen = actions[best, th.arange(len(obs))].clamp(-1, 1)
        return self.model.policy.unscale_action(chosen.numpy()), state


def mean_return(model, draw, env):
    """Of 20 episodes, from the same states every time."""
    env.seed(1000)
    return evaluate_policy(BestOf(model, draw), env, 20)[0]
