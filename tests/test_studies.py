"""Studies that several workers share: PostgreSQL, Optuna's proxy, and workers that die."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import postgres

pytestmark = pytest.mark.skipif(find_spec("rl_zoo3") is None, reason="rl-zoo3 is not installed")
ROOT = Path(__file__).parents[1]
needs_postgres = pytest.mark.skipif(
    postgres.programs() is None or not (find_spec("psycopg") or find_spec("psycopg2")),
    reason="PostgreSQL or psycopg is not installed",
)
COMPLETE, FAIL = "COMPLETE", "FAIL"


@pytest.fixture
def database():
    with postgres.server() as url:
        yield url


@contextmanager
def proxy(url):
    """Optuna's gRPC proxy of a storage, in a process of its own."""
    port = postgres.free_port()
    code = (
        "import sys; from optuna.storages import run_grpc_proxy_server; from sb3_consistency.zoo.studies import open_storage;"
        "run_grpc_proxy_server(open_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, url, str(port)], env=environment())
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def environment():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def worker(storage, folder, seed, n_trials, n_steps=6, heartbeat=1):
    options = {"--algo": "cpql", "--env": "Pendulum-v1", "-n": n_steps, "-f": folder / f"w{seed}", "--seed": seed}
    options |= {"--max-total-trials": n_trials, "--n-evaluations": 1, "--eval-episodes": 1, "--storage": storage}
    options |= {"--study-name": "shared", "--pruner": "none", "--sampler": "random", "--heartbeat": heartbeat}
    command = [sys.executable, "-m", "sb3_consistency", "optimize", "--no-optim-plots"]
    command += [str(part) for pair in options.items() for part in pair]
    command += ["-params", "policy_kwargs:dict(net_arch=[8])", "learning_starts:2"]
    with open(folder / f"{seed}.txt", "a") as out:
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=out)


def trials(storage):
    import optuna

    from sb3_consistency.zoo.studies import open_storage

    try:
        return optuna.load_study(storage=open_storage(storage), study_name="shared").trials
    except (KeyError, OSError, ValueError):
        return []  # nobody has begun


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)


@needs_postgres
def test_the_trial_of_a_dead_worker_is_tried_again(database, tmp_path):
    victim = worker(database, tmp_path, 1, 2, n_steps=10**6)
    wait_for(lambda: any(trial.params for trial in trials(database)), victim)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert worker(database, tmp_path, 2, 2).wait(timeout=120) == 0, (tmp_path / "2.txt").read_text()
    dead, *others = trials(database)
    assert dead.state.name == FAIL and [trial.state.name for trial in others] == [COMPLETE, COMPLETE]
    (again,) = [trial for trial in others if trial.system_attrs.get("failed_trial") == dead.number]
    # it may have died before it had all of them
    assert dead.params.items() <= again.params.items() and again.user_attrs["offline"] is False


def test_a_study_behind_optunas_proxy(tmp_path):
    for module in ("grpc", "google.protobuf.runtime_version"):
        pytest.importorskip(module, reason="the extra tune is not installed")
    with proxy(f"sqlite:///{tmp_path}/study.db") as address:
        assert worker(address, tmp_path, 1, 2).wait(timeout=120) == 0, (tmp_path / "1.txt").read_text()
        assert [trial.state.name for trial in trials(address)] == [COMPLETE, COMPLETE]


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("grpc://13000", ValueError, "grpc://host:13000"),
        ("grpc://host:port", ValueError, "grpc://host:13000"),
    ],
)
def test_bad_addresses_are_named(url, error, message):
    from sb3_consistency.zoo.studies import open_storage

    with pytest.raises(error, match=message):
        open_storage(url)


def test_missing_drivers_name_the_extra(monkeypatch):
    from sb3_consistency.zoo import studies

    monkeypatch.setattr(studies, "find_spec", lambda name: None)
    for url in ("postgresql://user:secret@host/db", "grpc://host:1"):
        with pytest.raises(ImportError, match=r"\.\[tune\]") as raised:
            studies.open_storage(url)
        assert "secret" not in str(raised.value)


@pytest.mark.slow
@needs_postgres
@pytest.mark.parametrize("behind_proxy", [False, True])
def test_sixty_trials_by_three_workers_of_which_each_is_killed_once(behind_proxy, database, tmp_path):
    def count(state):
        return sum(trial.state.name == state for trial in trials(database))

    def study(address):
        workers = {seed: worker(address, tmp_path, seed, 60, n_steps=60) for seed in (1, 2, 3)}
        for n_killed, seed in enumerate((1, 2, 3)):
            # as many trials as workers, besides those that the proxy leaves: the stopped one has one, too
            given_up, left = (0, n_killed) if behind_proxy else (n_killed, 0)

            def at_work(victim=workers[seed], given_up=given_up, left=left):
                if count(FAIL) < given_up or count("RUNNING") < 3 + left:
                    return False
                victim.send_signal(signal.SIGSTOP)
                if count(FAIL) == given_up and count("RUNNING") == 3 + left:
                    return True
                victim.send_signal(signal.SIGCONT)
                return False

            wait_for(at_work, workers[seed], 300)
            workers[seed].send_signal(signal.SIGKILL)
            workers[seed].wait()
            workers[seed] = worker(address, tmp_path, seed + 10, 60, n_steps=60)
        assert [process.wait(timeout=900) for process in workers.values()] == [0, 0, 0], (tmp_path / "11.txt").read_text()

    if behind_proxy:
        with proxy(database) as address:
            study(address)
    else:
        study(database)
    states = [trial.state.name for trial in trials(database)]
    print("states", {state: states.count(state) for state in set(states)})
    finished, dead = states.count(COMPLETE), [t for t in trials(database) if t.state.name in (FAIL, "RUNNING")]
    assert len(dead) == 3
    if behind_proxy:
        # the proxy has no heartbeat: what a dead worker had stays marked as running, and counts
        assert 57 <= finished <= 59 and states.count("RUNNING") == 3 and len(states) == finished + 3
        return
    assert 60 <= finished <= 62 and states.count("RUNNING") == states.count("WAITING") == 0
    again = {trial.system_attrs.get("failed_trial"): trial for trial in trials(database)}
    print("tried again", {trial.number: again[trial.number].number for trial in dead})
    assert all(trial.params.items() <= again[trial.number].params.items() for trial in dead)
