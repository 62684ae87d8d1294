"""Errors of damaged model files, told as such: SB3 passes on whatever zipfile, pickle, json and PyTorch raise."""

from collections.abc import Callable
from typing import Any


class ModelFileError(ValueError):
    """A model file that is damaged, or another model's. The message names the file and the cause."""


def read_model_file(read: Callable[[], Any], path: Any, what: str) -> Any:
    """
    :param read: reads the file
    :param path: the file, for the message
    :param what: what it should be, for the message
    :return: what ``read`` returns
    :raises ModelFileError: if it raises, unless the file is not there or the environment's spaces are others
    """
    try:
        return read()
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # their errors have no common base
        if "spaces do not match" in str(error) or "policy kwargs do not equal" in str(error):
            raise
        raise ModelFileError(f"{path}: damaged, or not {what}: {error!r}.") from error
