"""Errors of damaged model files, told as such: SB3 passes on whatever zipfile, pickle, json and PyTorch raise."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stable_baselines3.common.save_util import load_from_zip_file

from sb3_consistency.envs.spaces import adopted_spaces
from sb3_consistency.options import MISSING, options_of

# what SB3 says of a sound file that needs another environment, or other arguments
NOT_DAMAGE = ("spaces do not match", "policy kwargs do not equal", "must pass an environment")
# arguments of load() that change nothing in the model
NO_CHANGES = {"custom_objects", "print_system_info", "force_reset"}


class ModelFileError(ValueError):
    """A model file that is damaged, or another model's. The message names the file and the cause."""


def read_model_file(read: Callable[[], Any], path: Any, what: str) -> Any:
    """
    :param read: reads the file
    :param path: the file, for the message
    :param what: what it should be, for the message
    :return: what ``read`` returns
    :raises ModelFileError: if it raises, unless the file is not there or the environment is not the one it needs
    """
    try:
        return read()
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except FileNotFoundError as error:  # SB3's names the last spelling that it tried
        raise FileNotFoundError(f"{path}: there is no such file, nor one with '.zip' added.") from error
    except (IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # their errors have no common base
        if any(told in str(error) for told in NOT_DAMAGE):
            raise
        raise ModelFileError(f"{path}: damaged, or not {what}: {error!r}.") from error


def load_model(load: Callable[..., Any], path: Any, env: Any, cls: type[Any], given: dict[str, Any]) -> Any:
    """
    :param load: SB3's ``load``
    :param path: the file
    :param env: environment, or None
    :param cls: the algorithm
    :param given: further arguments of ``load``
    :return: the model
    :raises ModelFileError: if the file is damaged, or holds another algorithm's model
    :raises ValueError: if the file is sound, but not with the arguments given
    """
    cls_name = cls.__name__
    what = f"a file of {cls_name}.save()"
    given = {**_options_of_before(cls, path, given), **given}
    try:
        return read_model_file(lambda: _load_with_spaces_of(env, load, path, given), path, what)
    except ModelFileError as error:
        changed = [f"{name.lstrip('_')}={value!r}" for name, value in given.items() if name not in NO_CHANGES]
        if not changed:
            raise
        # the file's fault, or theirs? Without them, and with a buffer that needs no memory, it loads or says what it has
        small = {"custom_objects": given.get("custom_objects"), "device": "cpu", "buffer_size": 1}
        read_model_file(lambda: _load_with_spaces_of(env, load, path, small), path, what)
        cause = str(error.__cause__)
        told = "the networks would not be those of the file" if "state_dict" in cause else cause.rstrip(".")
        fit = f"argument {changed[0]} does" if len(changed) == 1 else f"arguments {', '.join(changed)} do"
        raise ValueError(f"{cls_name}.load(): the {fit} not fit {path}: {told}.") from error.__cause__


def _options_of_before(cls: type[Any], path: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Values of options that did not exist when the file was written: what models did without them."""
    later = {o.attribute: o.before for o in options_of(cls).values() if o.before is not MISSING}
    if not later:
        return {}
    stored = stored_names(path)
    return {} if stored is None else {name: value for name, value in later.items() if name not in stored}


def stored_names(path: Any) -> set[str] | None:
    """
    :param path: file of ``save``
    :return: names of the attributes in it; None if it can't be read
    """
    for file in (path, f"{path}.zip"):
        try:
            with zipfile.ZipFile(file) as archive:
                return set(json.loads(archive.read("data")))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue
    return None


def _load_with_spaces_of(env: Any, load: Callable[..., Any], path: Any, given: dict[str, Any]) -> Any:
    """SB3's ``load``; the environment's spaces take the place of those that were inferred from arrays."""
    try:
        return load(path, env, **given)
    except ValueError as error:
        if "spaces do not match" not in str(error):
            raise
        custom = given.get("custom_objects") or {}
        data = load_from_zip_file(path, device="cpu", custom_objects=custom)[0] or {}
        inferred = {name: data[name] for name in getattr(data.get("run"), "inferred_spaces", ())}
        if not inferred:
            raise
        adopted = {**adopted_spaces(inferred, env), "run": replace(data["run"], inferred_spaces=[])}
        return load(path, env, **{**given, "custom_objects": {**custom, **adopted}})
