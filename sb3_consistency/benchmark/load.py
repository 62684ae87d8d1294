"""Is the machine at work for us alone? And the clock."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch as th

# above this share of busy time, in percent, other work on the machine would be measured too
LOAD_LIMIT = 20.0


def wait_for(model: Any) -> None:
    """
    :param model: model whose device is to finish what it was given
    """
    if th.device(model.device).type == "cuda":
        th.cuda.synchronize()


def timed_calls(model: Any, call: Callable[[], Any], n: int) -> list[float]:
    """
    :param model: model that acts
    :param call: one call
    :param n: number of calls
    :return: seconds of every call
    """
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        call()
        wait_for(model)
        seconds.append(time.perf_counter() - began)
    return seconds


def busy() -> float:
    """
    :return: share of busy processor time in one second in which this process sleeps, in percent
    """
    return float(psutil.cpu_percent(interval=1.0))


class OtherLoad:
    """How busy the processors are, from now on, with anything but this process and its children (compilers)."""

    def __init__(self) -> None:
        self.began, self.others = time.perf_counter(), _seconds_of_others()

    def processors(self) -> float:
        """
        :return: number of processors that other work took, on average, since this was made
        """
        return round(max(0.0, _seconds_of_others() - self.others) / (time.perf_counter() - self.began), 3)


def _seconds_of_others() -> float:
    everyone = psutil.cpu_times()._asdict()
    # steal is what other virtual machines took; interrupts are part of the system's time or small
    busy = sum(everyone.get(kind, 0.0) for kind in ("user", "nice", "system", "steal"))
    return float(busy - processor_seconds())


def processor_seconds() -> float:
    """
    :return: processor time of this process and its children, the ended ones included
    """
    this = psutil.Process()
    own = sum(this.cpu_times()[:4])
    for child in this.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            own += sum(child.cpu_times()[:4])
    return float(own)


def check_load(force: bool) -> float:
    """
    :param force: accept a loaded machine
    :return: share of busy processor time, in percent
    :raises RuntimeError: if the machine is loaded
    """
    load = busy()
    if load > LOAD_LIMIT and not force:
        raise RuntimeError(
            f"The processors are {load:.0f} % busy (limit {LOAD_LIMIT:.0f} %): speeds measured now mean nothing. Stop the "
            "other work, or measure all the same with --force (the report will say so)."
        )
    return load
