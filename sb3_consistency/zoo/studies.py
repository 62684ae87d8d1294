"""Studies that several workers share: where they are kept, what becomes of dead workers' trials, several seeds per trial."""

import random
import time
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from sb3_consistency.registry import how_to_install

# a dead worker's trial is tried again, but not for ever: the trial may be what kills them
RETRIES = 3
# signs of life that may be missing
MISSED_HEARTBEATS = 3


def open_storage(url: str, heartbeat: int = 60) -> BaseStorage:
    """
    :param url: ``...log``, a journal file; ``grpc://host:port``, Optuna's proxy server; or a database as SQLAlchemy names it,
        ``postgresql://user:password@host/db`` or ``sqlite:///study.db``
    :param heartbeat: seconds between the signs of life of a worker, which only databases keep
    :return: the storage
    :raises ImportError: if a library for it is missing
    :raises ValueError: if the address is no address
    """
    if url.endswith(".log"):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(url))
    if url.startswith("grpc://"):
        host, _, port = url.removeprefix("grpc://").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--storage: a proxy is named like grpc://host:13000, got {url!r}.")
        if find_spec("grpc") is None:
            raise ImportError(f"--storage {url} needs grpcio: {how_to_install('tune')}.")
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    if url.startswith("postgresql://") and find_spec("psycopg2") is None:
        # SQLAlchemy asks for psycopg2 unless it is told of its successor
        if find_spec("psycopg") is None:
            raise ImportError(f"--storage {url.split('@')[-1]} needs psycopg: {how_to_install('tune')}.")
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    storages: Any = optuna.storages
    # Optuna's names from 5.0 on, and those of before
    renamed = hasattr(storages, "RetryHeartbeatStaleTrialCallback")
    retry = storages.RetryHeartbeatStaleTrialCallback if renamed else storages.RetryFailedTrialCallback
    name = "heartbeat_stale_trial_callback" if renamed else "failed_trial_callback"
    with warnings.catch_warnings():
        # that heartbeats are experimental, as they have been for years
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage: BaseStorage = storages.RDBStorage(
            url,
            # a connection that was lost is made anew
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=heartbeat,
            grace_period=MISSED_HEARTBEATS * heartbeat,
            **{name: retry(max_retry=RETRIES)},
        )
    return storage


def fail_stale_trials(study: optuna.Study) -> None:
    """
    :param study: study, of which the trials of dead workers are given up, to be tried again
    """
    with warnings.catch_warnings():
        # that heartbeats are experimental, as they have been for years
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


class PatientStudy(optuna.Study):
    """A study that is over only when no worker's trial is left over: those of dead workers are tried again."""

    #: seconds, at most, from one look at the others' trials to the next
    patience = 5.0

    def optimize(self, *args: Any, **kwargs: Any) -> None:
        """
        Optimise, and then wait for the other workers; see Optuna's method.

        :param args: as Optuna's
        :param kwargs: as Optuna's
        """
        super().optimize(*args, **kwargs)
        if getattr(self._storage, "get_heartbeat_interval", lambda: None)() is None:
            return  # nobody can tell whether the others are alive
        while self.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            fail_stale_trials(self)
            # not all workers at once: there may be a single trial to try again
            time.sleep(self.patience * random.random())
            if self.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                super().optimize(*args, **{**kwargs, "n_trials": 1})


def patiently(create_study: Any, storage: BaseStorage | None) -> Any:
    """
    :param create_study: Optuna's function
    :param storage: a storage to use instead of the one it is given; None for that one
    :return: the function, of :class:`PatientStudy`
    """

    def create(*args: Any, **kwargs: Any) -> optuna.Study:
        study: optuna.Study = create_study(*args, **{**kwargs, **({} if storage is None else {"storage": storage})})
        study.__class__ = PatientStudy
        # what died before is no running trial
        fail_stale_trials(study)
        return study

    return create


class Repetition:
    """
    Stands in for a trial in its second and later seeds: the study is told of the first one's evaluations.

    :param trial: the trial
    :param number: number of the seed
    """

    def __init__(self, trial: optuna.Trial, number: int) -> None:
        self.trial, self.number = trial, f"{trial.number}_seed_{number}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)

    def report(self, value: float, step: int) -> None:
        """
        :param value: not told
        :param step: not told
        """

    def should_prune(self) -> bool:
        """
        :return: False
        """
        return False


def report_seeds(trial: optuna.Trial, returns: list[float]) -> float:
    """
    :param trial: a trial
    :param returns: what each of its seeds came to
    :return: their mean; the trial's attributes tell each, and the standard error of the mean
    """
    trial.set_user_attr("returns", returns)
    trial.set_user_attr("standard_error", float(np.std(returns, ddof=1) / np.sqrt(len(returns))))
    return float(np.mean(returns))
