"""
Watch the memory and the open files of a long run: ``python tests/soak.py --minutes 60 --name online -- COMMAND...``.

Samples the command's processes twice a minute, stops it after the time, writes a CSV and a PNG, and fails if peak memory grows
by more than the limit between the second and the last third of the time, if file handles do, or if the command ends early.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
from tqdm.auto import tqdm


def sample(root: psutil.Process, began: float) -> dict[str, float]:
    processes = [root, *root.children(recursive=True)]
    return {
        "minutes": (time.monotonic() - began) / 60,
        "MB": sum(p.memory_info().rss for p in processes) / 1e6,
        "files": sum(p.num_fds() for p in processes),
        "threads": sum(p.num_threads() for p in processes),
    }


def watch(command: list[str], minutes: float, interval: float, log: Path) -> list[dict[str, float]]:
    began, rows = time.monotonic(), []
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        root = psutil.Process(process.pid)
        try:
            with tqdm(total=round(minutes, 1), unit="min") as bar:
                while (time.monotonic() - began) / 60 < minutes:
                    time.sleep(interval)
                    if process.poll() is not None:
                        raise SystemExit(f"The command ended after {len(rows)} samples with {process.returncode}; see {log}.")
                    rows.append(sample(root, began))
                    bar.update(interval / 60)
        finally:
            for child in root.children(recursive=True) if root.is_running() else []:
                child.kill()
            process.kill()
    return rows


def growth(rows: list[dict[str, float]], column: str) -> float:
    """Peak of the last third of the time minus that of the second: memory swings, and the first third fills caches."""
    third = len(rows) // 3
    return max(row[column] for row in rows[2 * third :]) - max(row[column] for row in rows[third : 2 * third])


def draw(rows: list[dict[str, float]], title: str, path: Path) -> None:
    figure, (memory, files) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    for axis, column, label in ((memory, "MB", "resident memory, MB"), (files, "files", "open file handles")):
        axis.plot([r["minutes"] for r in rows], [r[column] for r in rows])
        axis.set(xlabel="minutes", ylabel=label, ylim=(0, 1.2 * max(r[column] for r in rows)))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--interval", type=float, default=30, help="seconds between two samples")
    parser.add_argument("--name", default="soak", help="name of the CSV and the PNG")
    parser.add_argument("--folder", type=Path, default=Path("soak"))
    parser.add_argument("--limit", type=float, default=20, help="MB by which the peaks of the thirds may differ")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("give the command to watch after --")
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = watch(command, args.minutes, args.interval, args.folder / f"{args.name}.log")
    with (args.folder / f"{args.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: round(v, 2) for k, v in row.items()} for row in rows)
    draw(rows, f"{args.name}: {args.minutes:g} minutes", args.folder / f"{args.name}.png")
    grown = {column: growth(rows, column) for column in ("MB", "files", "threads")}
    print(f"from the second to the last third: {', '.join(f'{k} {v:+.1f}' for k, v in grown.items())}")
    if grown["MB"] > args.limit or grown["files"] > 0 or grown["threads"] > 0:
        sys.exit("Memory, files or threads grow.")


if __name__ == "__main__":
    main()
