"""One folder per benchmark run: an append-only file of records, each with the versions that it was measured with."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "mujoco", "gymnasium", "minari", "stable-baselines3", "sb3-consistency")

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
    :return: whether its times mean something: it ran alone, and next to nothing else kept the processors busy
    """
    return bool(record.get("processes") == 1 and record.get("other_load", 0.0) <= OTHER_LOAD_LIMIT)


class Records:
    """
    The records of one kind in a folder, one JSON object per line.

    Appending is the only way to change them, and a last line that a killed process left half-written is skipped.

    :param folder: folder of the benchmark run, created with the first record
    :param kind: name of the file: "runs", "speed" or "scaling"
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / f"{kind}.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """
        :return: all complete records, in the order in which they were written
        """
        records = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def append(self, record: dict[str, Any]) -> None:
        """
        :param record: record to write; it is on the disk when this returns
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
