"""Checkpoint folders on disk: written whole or not at all, verified before they are read."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sb3_consistency.envs.state import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
# names of unfinished writes begin with it; whoever writes next removes them
UNFINISHED = ".unfinished-"
NAME = re.compile(r"checkpoint-\d{6,}")

Writer = Callable[[BinaryIO], object]


class Checkpoint(NamedTuple):
    """An intact checkpoint: its folder, and its manifest."""

    path: Path
    manifest: dict[str, Any]

    def file(self, name: str) -> Path | None:
        """
        :param name: key of a file in the manifest
        :return: where it lies; None if the checkpoint has none of this name
        """
        entry = self.manifest["files"].get(name)
        return None if entry is None else self.path / entry["path"]


class _HashingFile:
    """What is written, counted and hashed on its way: a second pass over gigabytes is not needed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self.sha256.update(view)
        self.size += len(view)
        return len(view)


def _write_file(path: Path, writer: Writer) -> dict[str, Any]:
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        writer(hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return {"path": path.name, "bytes": hashing.size, "sha256": hashing.sha256.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is; Windows can't be asked for that."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """
    :param folder: folder of checkpoints
    :return: its checkpoints, oldest first
    """
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def remove_unfinished(folder: Path) -> None:
    """
    :param folder: folder of checkpoints, to rid of what killed writes left behind
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def write_shared(folder: Path, kind: str, writer: Writer) -> dict[str, Any]:
    """
    Write a file that all checkpoints of a folder refer to, under a name made of its content.

    :param folder: folder of checkpoints
    :param kind: what the name begins with
    :param writer: called with the open file
    :return: its entry for the manifests of the checkpoints
    :raises OSError: if it can't be written; nothing is left behind then
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    temporary = folder / f"{UNFINISHED}{kind}"
    try:
        entry = _write_file(temporary, writer)
        name = f"{kind}-{entry['sha256'][:16]}"
        os.replace(temporary, folder / name)
        _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return {**entry, "path": f"../{name}"}


def write_checkpoint(
    folder: Path, writers: Mapping[str, Writer], shared: Mapping[str, dict[str, Any]], facts: dict[str, Any], keep: int
) -> Path:
    """
    Write the next checkpoint of a folder, then remove those beyond the newest ``keep``.

    Everything goes to a temporary folder beside it, reaches the disk, and gets its name last: a process that is
    killed on the way leaves the earlier checkpoints as they were.

    :param folder: folder of checkpoints, made if it is missing
    :param writers: file name -> called with the open file
    :param shared: name -> entry of a file that :func:`write_shared` wrote
    :param facts: what else the manifest says
    :param keep: checkpoints to keep
    :return: the new checkpoint's folder
    :raises OSError: if it can't be written; the earlier checkpoints are intact, and nothing is left behind
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    earlier = list_checkpoints(folder)
    number = _number(earlier[-1]) + 1 if earlier else 1
    final = folder / f"checkpoint-{number:06d}"
    temporary = folder / f"{UNFINISHED}{final.name}"
    try:
        temporary.mkdir()
        files = {name: _write_file(temporary / name, writer) for name, writer in writers.items()}
        manifest = {"format": FORMAT, **facts, "files": {**files, **shared}}
        manifest["sha256"] = _manifest_hash(manifest)
        _write_file(temporary / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(folder, keep)
    return final


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, keep: int) -> None:
    checkpoints = list_checkpoints(folder)
    for path in checkpoints[:-keep]:
        with suppress(OSError):
            # renamed first: a kill half-way must not leave a checkpoint that looks whole
            doomed = path.rename(folder / f"{UNFINISHED}{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
    used = set()
    for path in checkpoints[-keep:]:
        try:
            used |= {Path(entry["path"]).name for entry in read_manifest(path)["files"].values()}
        except CheckpointError:
            return  # which shared files it needs can't be told
    for path in folder.glob("dataset-*"):
        if path.name not in used:
            with suppress(OSError):
                path.unlink()


def read_manifest(path: Path) -> dict[str, Any]:
    """
    :param path: a checkpoint's folder
    :return: what it says of its files and its run; they are not looked at
    :raises CheckpointError: if it is missing or damaged
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        intact = manifest["sha256"] == _manifest_hash(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} can't be read ({error!r})") from error
    if not intact:
        raise CheckpointError(f"{path / MANIFEST} does not match its own checksum")
    return dict(manifest)


def verify(path: Path) -> Checkpoint:
    """
    Check every byte of a checkpoint.

    :param path: its folder
    :return: the checkpoint
    :raises CheckpointError: naming the file that is missing, cut off or changed
    """
    manifest = read_manifest(path)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}, this version reads {FORMAT}: update sb3_consistency")
    for entry in manifest["files"].values():
        file = path / entry["path"]
        if not file.is_file():
            raise CheckpointError(f"{file.resolve()} is missing")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file.resolve()} has {size} bytes, not {entry['bytes']}")
        with open(file, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{file.resolve()} does not match its checksum")
    return Checkpoint(path, manifest)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """
    Find the newest intact checkpoint; a warning names every newer one that is broken, and what is wrong with it.

    :param folder: folder of checkpoints
    :return: the checkpoint
    :raises CheckpointError: if there is none
    """
    folder = Path(folder)
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(
            f"folder: there is no checkpoint in {str(folder)!r}; pass the folder that a ResumableCheckpointCallback writes to."
        )
    broken = []
    for path in reversed(checkpoints):
        try:
            checkpoint = verify(path)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        for problem in broken:
            warnings.warn(f"A checkpoint is broken: {problem}. Falling back to {path.name}.", stacklevel=4)
        return checkpoint
    raise CheckpointError(f"folder: no checkpoint in {str(folder)!r} is intact: {'; '.join(broken)}.")
