"""Environments whose process dies."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class DyingEnv(gym.Env):
    """The process that steps it dies, without a chance to say so."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


class DyingOnceEnv(DyingEnv):
    """
    A walk to a goal, whose process dies at the 55th step, but only once: a file says that it did.

    The file is named by the variable DIES_ONCE, without which nothing happens; DIES_BY is the signal. STEP_SECONDS is how
    long a step takes.
    """

    n_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.place = 0, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.place, {}

    def step(self, action):
        self.n_steps += 1
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        if self.n_steps == 55 and "DIES_ONCE" in os.environ:
            marker = Path(os.environ["DIES_ONCE"])
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), getattr(signal, os.environ.get("DIES_BY", "SIGKILL")))
        self.t += 1
        self.place = np.clip(self.place + 0.1 * self.np_random.standard_normal(2) + 0.2 * action, -1, 1).astype(np.float32)
        return self.place, -float(np.square(self.place).sum()), False, self.t == 20, {}


gym.register("Dying-v0", DyingEnv, max_episode_steps=5)
gym.register("DyingOnce-v0", DyingOnceEnv)
