"""What is broken in rl-zoo3 2.9 and its dependencies; each cure asks first whether the illness is still there."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from sb3_consistency.registry import how_to_install


def around(module: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """
    Decorator: put a function around one of rl-zoo3's, in its place, once however often it is asked for.

    :param module: a module of rl-zoo3
    :param name: name of its function
    :return: takes what is called with the function itself and its arguments
    """
    original = getattr(getattr(module, name), "original", getattr(module, name))

    def put(wrapper: Callable[..., Any]) -> None:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        wrapped.original = original  # type: ignore[attr-defined]
        setattr(module, name, wrapped)

    return put


def import_load_from_hub() -> None:
    """
    Import ``rl_zoo3.load_from_hub``, which ``enjoy`` imports.

    It takes an exception from requests, which nothing installs, and which is not what the hub's client raises.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        import rl_zoo3.load_from_hub as module
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "requests":
            raise
        requests, exceptions = ModuleType("requests"), ModuleType("requests.exceptions")
        exceptions.HTTPError = EntryNotFoundError  # type: ignore[attr-defined]
        sys.modules |= {"requests": requests, "requests.exceptions": exceptions}
        try:
            import rl_zoo3.load_from_hub as module
        finally:
            # only for this import: whoever else asks must not find a stand-in
            del sys.modules["requests"], sys.modules["requests.exceptions"]
    caught = getattr(module, "HTTPError", EntryNotFoundError)
    if not issubclass(EntryNotFoundError, caught):
        vars(module)["HTTPError"] = EntryNotFoundError


def import_push_to_hub() -> Any:
    """
    Import ``rl_zoo3.push_to_hub``, which imports a function that huggingface_sb3 has renamed.

    :return: the module
    """
    # the package hides its module behind a function of the same name
    library: Any = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(library, "generate_metadata") and hasattr(library, "_generate_metadata"):
        library.generate_metadata = lambda *args: library._generate_metadata(*args).to_dict()
    import rl_zoo3.push_to_hub

    return rl_zoo3.push_to_hub


def redirect_record_video(module: Any) -> None:
    """
    ``record_training`` runs ``python -m rl_zoo3.record_video``, which does not know our algorithms; run ours.

    :param module: the module ``rl_zoo3.record_training``
    """

    def call(command: list[str], *args: Any, **kwargs: Any) -> int:
        if command[1:3] == ["-m", "rl_zoo3.record_video"]:
            command = [sys.executable, "-m", "sb3_consistency", "record-video", *command[3:]]
        return subprocess.call(command, *args, **kwargs)

    if hasattr(module, "subprocess"):
        module.subprocess = SimpleNamespace(call=call)


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """
    rl-zoo3 calls ``ffmpeg`` through a shell; where there is none, lend it the binary that moviepy brings along.

    :raises ImportError: if there is neither
    """
    if shutil.which("ffmpeg"):
        yield
        return
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        executable = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"Videos need ffmpeg: install it, or {how_to_install('zoo')}.") from error
    before = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ffmpeg").symlink_to(executable)
        os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before


def has_display() -> bool:
    """
    :return: whether a window can be opened
    """
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def render_offscreen() -> None:
    """Without a display MuJoCo renders through EGL or OSMesa, if it is told so before it is imported."""
    if has_display() or "MUJOCO_GL" in os.environ:
        return
    for backend, library in {"egl": "EGL", "osmesa": "OSMesa"}.items():
        # told of one that is not there, MuJoCo can't even be imported
        if find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return


def require_pandas() -> None:
    """
    rl-zoo3 writes its tuning report with pandas, which it does not install; ask before the work, not after.

    :raises ImportError: if it is missing
    """
    try:
        import pandas  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Tuning reports need pandas: {how_to_install('zoo')}.") from error
