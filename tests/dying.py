"""An environment that kills its process, as lack of memory does: ``gym.make("tests.dying:Dying-v0")``."""

import os
import signal

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class DyingEnv(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


gym.register("Dying-v0", DyingEnv)
