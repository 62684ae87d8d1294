"""A run folder of rl-zoo3 (``logs/sac/Pendulum-v1_1``), trained with ``--save-replay-buffer``."""

from __future__ import annotations

import copy
import glob
import os
from typing import Any

from sb3_consistency.data.checks import DatasetError
from sb3_consistency.data.formats.replay_buffer import BufferSource, open_buffer
from sb3_consistency.data.recognise import BUFFERS

ORDERED = "tag:yaml.org,2002:python/object/apply:collections.OrderedDict"


def open_zoo_run(path: str) -> BufferSource:
    """
    Read the replay buffer of a run; its environment is named by the ``args.yml`` beside it.

    :param path: the folder; a buffer that rl-zoo3 itself saved is a pickle, which runs the code in it
    :return: its episodes
    :raises DatasetError: if there is no replay buffer
    """
    files = [file for name in BUFFERS if os.path.isfile(file := os.path.join(path, name))]
    if not files:
        raise DatasetError(f"dataset: {path} has no {' or '.join(BUFFERS)}: train with --save-replay-buffer to keep it.")
    source = open_buffer(files[0])
    for arguments in glob.glob(os.path.join(glob.escape(path), "*", "args.yml")):
        source.env_spec = _spec(_read(arguments))
    return source


def _read(path: str) -> dict[str, Any]:
    """The arguments of a run: rl-zoo3 writes an OrderedDict, as lists of pairs, whose other objects are not made."""
    try:
        import yaml
    except ImportError:
        return {}

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor(ORDERED, lambda loader, node: loader.construct_sequence(node, deep=True))
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    try:
        with open(path) as file:
            content = yaml.load(file, Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    try:
        return dict(content[0]) if isinstance(content, list) else dict(content)
    except (TypeError, ValueError, IndexError):
        return {}


def _spec(arguments: dict[str, Any]) -> Any:
    import gymnasium as gym

    from sb3_consistency.envs.wrappers import make_known

    env_id = arguments.get("env")
    if not isinstance(env_id, str):
        return None
    make_known(env_id)
    if env_id not in gym.registry:
        return None
    spec = copy.deepcopy(gym.spec(env_id))
    kwargs = arguments.get("env_kwargs")
    spec.kwargs.update(kwargs if isinstance(kwargs, dict) else {})
    return spec
