"""One folder per benchmark run: a file for every record, each with the versions that it was measured with."""

import json
import os
import platform
import socket
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "mujoco", "gymnasium", "minari", "stable-baselines3", "sb3-consistency", "d3rlpy", "sbx-rl")

# processors' worth of other work, beyond which times say nothing
OTHER_LOAD_LIMIT = 0.2


def package_version(name: str) -> str:
    """
    :param name: name of a distribution
    :return: its version; empty if it is not installed
    """
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@cache
def provenance() -> dict[str, str]:
    """
    :return: versions, commit (marked "+" if the package was changed since), processor and date
    """
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # installed from a wheel, or no git
            return ""

    commit = git("rev-parse", "--short", "HEAD")
    # the folder is git's own only if it tracks this file: an installed package may lie in another project's checkout
    tracked = commit and git("ls-files", "records.py")
    changed = "+" if tracked and git("status", "--porcelain", "--untracked-files=no", "--", "..") else ""
    return {
        **{name: package_version(name) for name in PACKAGES},
        "commit": commit + changed if tracked else "",
        "processor": processor(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """
    :return: name and number of cores of this machine's processor
    """
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def had_the_machine(record: dict[str, Any]) -> bool:
    """
    :param record: record of a run
    :return: whether its times mean something: it ran alone, in one go, and next to nothing else kept the processors busy
    """
    alone = record.get("processes") == 1 and not record.get("resumed")
    return bool(alone and record.get("other_load", 0.0) <= OTHER_LOAD_LIMIT)


class Records:
    """
    The records of one kind in a folder: a file for every job, whole or not at all, so that any number of machines write.

    The files hold a line each: ``cat runs/*.json >> runs.jsonl`` packs them, and both are read.

    :param folder: folder of the benchmark run, created with the first record
    :param kind: what they are of: "runs", "speed" or "scaling"
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder / kind
        self.packed = folder / f"{kind}.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """
        :return: all records, the packed ones first
        :raises ValueError: if a file holds anything else
        """
        records = []
        for path in [self.packed, *sorted(self.folder.glob("*.json"))]:
            for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}: line {number} is no record ({error}); delete it, and run the job again."
                    ) from error
        return records

    def write(self, name: str, record: dict[str, Any]) -> None:
        """
        Write a record, in the place of an earlier one of its name.

        :param name: what tells the job from all others
        :param record: record to write; it is on the disk, whole, when this returns
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # of this process alone: two may have run the same job
        unfinished = self.folder / f".{name}.{socket.gethostname()}.{os.getpid()}"
        try:
            with unfinished.open("w") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.folder / f"{name}.json")
        finally:
            unfinished.unlink(missing_ok=True)
