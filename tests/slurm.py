"""A Slurm cluster of one's own: one node, on loopback, in a folder of its own, with the accounts that ``sacct`` reads."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.postgres import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch", "sacct", "scontrol")
# Debian keeps its daemons where users don't look
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# jobs of the partition "urgent" pre-empt those of "cheap"; what is queued again may start within seconds; submitit knows
# jobs by their numbers for as long as the process lives: those of two clusters must differ
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld}
FirstJobId={slurmctld}
SlurmdPort={slurmd}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
KillWait=1
ReturnToService=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
AccountingStoragePass={folder}/munge/socket
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=cheap Nodes=ALL Default=YES PriorityTier=1 OverSubscribe=NO
PartitionName=urgent Nodes=ALL PriorityTier=10 OverSubscribe=NO PreemptMode=OFF
"""
ACCOUNTS = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass=none
StorageLoc=accounts
"""


def programs():
    """Whether all that it takes is installed (Debian: ``apt-get install slurm-wlm slurmdbd munge mariadb-server``)."""
    return all(shutil.which(name, path=PATH) for name in PROGRAMS)


@contextmanager
def cluster():
    """
    A cluster for as long as the context lasts.

    :return: the environment variables with which its commands find it
    """
    host = socket.gethostname()
    ports = {name: free_port() for name in ("slurmctld", "slurmd", "slurmdbd", "mariadb")}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)  # munge wants it so
        names = {"folder": folder, "host": host, "user": getpass.getuser(), "cpus": os.cpu_count(), **ports}
        environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name, text in {"slurm.conf": CONFIGURATION, "slurmdbd.conf": ACCOUNTS}.items():
            (folder / name).write_text(text.format(**names))
        (folder / "slurmdbd.conf").chmod(0o600)
        for name in ("munge", "state", "spool", "sql"):
            (folder / name).mkdir(mode=0o755)

        def start(*command):
            log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            process = subprocess.Popen([*map(str, command)], env=environment, cwd=folder, stdout=log, stderr=log)
            stack.callback(_end, process)

        def ask(*command, until="", seconds=60):
            deadline = time.monotonic() + seconds
            while True:
                done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
                if done.returncode == 0 and until in done.stdout:
                    return
                if time.monotonic() > deadline:
                    logs = "".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.[lo]*[gt]"))
                    raise RuntimeError(f"{command}: {done.stdout}{done.stderr}\n{logs}")
                time.sleep(0.3)

        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = {"--socket": "socket", "--key-file": "key", "--pid-file": "pid", "--log-file": "log", "--seed-file": "seed"}
        start("munged", "--foreground", "--force", *(f"{option}={folder}/munge/{name}" for option, name in munge.items()))

        sql, sql_socket = ["--no-defaults", f"--datadir={folder}/sql", f"--user={names['user']}"], folder / "sql.socket"
        ask("mariadb-install-db", *sql, "--auth-root-authentication-method=normal", "--skip-test-db")
        start("mariadbd", *sql, "--bind-address=127.0.0.1", f"--port={ports['mariadb']}", f"--socket={sql_socket}")
        grant = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'none'; GRANT ALL ON accounts.* TO slurm@'127.0.0.1'"
        ask("mariadb", "--no-defaults", "--user=root", f"--socket={sql_socket}", "-e", grant)

        start("slurmdbd", "-D")
        ask("sacctmgr", "-i", "show", "cluster")
        start("slurmctld", "-D", "-i")
        start("slurmd", "-D", "-N", host)
        ask("sinfo", "--noheader", "--format=%T", until="idle")
        ask("sacctmgr", "-n", "show", "cluster", until="tests")
        try:
            yield {name: environment[name] for name in ("PATH", "SLURM_CONF")}
        finally:
            # a job that outlives the cluster waits for it for ever
            ask("scancel", f"--user={names['user']}")
            ask("sinfo", "--noheader", "--format=%T", until="idle")


def _end(process):
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
