"""One progress display for both phases: a bar in a terminal, a line every few seconds in a log file."""

import sys
import time
from typing import Any

from stable_baselines3.common.callbacks import ProgressBarCallback

#: between two lines where the output is no terminal
SECONDS = 5.0


def spelled(seconds: float) -> str:
    """
    :param seconds: a duration
    :return: the same as people say it: "8 s", "3 min", "2 h 05 min"
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class PhaseProgress(ProgressBarCallback):
    """
    SB3's progress bar, which counts gradient steps in an offline phase, and writes lines where there is no terminal.

    :param phase: what goes on: "Pretraining" or "Training"
    """

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.is_bar = sys.stdout.isatty()

    def _on_training_start(self) -> None:
        self.start, self.began = self.model.num_timesteps, time.monotonic()
        self.told = self.began
        self.total: Any = self.locals["total_timesteps"] - self.start
        if self.is_bar:
            super()._on_training_start()
            self.pbar.set_description(self.phase)

    def _on_step(self) -> bool:
        done = self.model.num_timesteps - self.start
        if self.is_bar:
            self.pbar.update(done - self.pbar.n)
        elif time.monotonic() - self.told >= SECONDS:
            self._tell(done)
        return True

    def _tell(self, done: int) -> None:
        self.told = time.monotonic()
        rate = done / max(self.told - self.began, 1e-9)
        left = f", {spelled((self.total - done) / rate)} left" if 0 < done < self.total else ""
        share = f" ({100 * done // self.total} %)" if self.total > 0 else ""
        print(f"{self.phase}: {done:,} of {self.total:,} steps{share}, {rate:,.0f} per second{left}", flush=True)

    def _on_training_end(self) -> None:
        if self.is_bar:
            super()._on_training_end()
        else:
            self._tell(self.model.num_timesteps - self.start)
