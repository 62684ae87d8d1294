"""
The state of environments, to continue an episode in another process.

Environments can't just be pickled: those that derive from Gymnasium's ``EzPickle`` (MuJoCo's, Box2D's) pickle and
deepcopy as newly made ones, without a word. Here the attributes of every layer are pickled, MuJoCo's data by its own
means, and what can't be captured is said to be so.
"""

import functools
import io
import pickle
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
from gymnasium import spaces
from gymnasium.utils import EzPickle
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

# what is fixed by an environment's construction, or belongs to the process that it runs in
STATIC_NAMES = frozenset(
    "env venv envs spec metadata render_mode class_attributes results_writer "
    "_cached_spec _saved_kwargs _ezpickle_args _ezpickle_kwargs".split()
)
STATIC_TYPES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial, type)
# windows and renderers; MuJoCo's model and data, which are no plain attributes
STATIC_MODULES = ("pygame", "mujoco", "gymnasium.envs.mujoco.mujoco_rendering")
# of a VecEnv all else is overwritten by every step
VEC_ENV_NAMES = ("_seeds", "_options", "reset_infos", "action_space", "observation_space")


class CheckpointError(ValueError):
    """A folder without an intact checkpoint, or one that does not fit the model or environment."""


class NotCapturableError(Exception):
    """Why the state of an environment can't be captured."""


class VecEnvState(NamedTuple):
    """
    State of a VecEnv.

    ``classes`` are those of its layers, the outermost first; ``layers`` holds their states, ``envs`` those of the
    environments in it (None if not captured), ``reason`` says why it is not complete, if so.
    """

    classes: list[str]
    n_envs: int
    layers: list[bytes | None]
    envs: list[bytes] | None
    reason: str | None


class CapturableEnv(gym.Wrapper):
    """
    Lets a process of a ``SubprocVecEnv`` hand out its environment's state; must be the outermost wrapper.

    Use it as ``make_vec_env(..., vec_env_cls=SubprocVecEnv, wrapper_class=CapturableEnv)``. An environment with
    ``capture_state()`` and ``restore_state(state)`` of its own (a simulator of yours) needs it not.

    :param env: the environment
    """

    def capture_state(self) -> Any:
        """
        :return: the state of the environment; a :class:`NotCapturableError` that says why there is none
        """
        try:
            return capture_env(self.env)
        except NotCapturableError as error:
            # raised, it would end the process
            return error

    def restore_state(self, state: bytes) -> None:
        """
        :param state: what :meth:`capture_state` returned
        """
        restore_env(self.env, state)


def capture_vec_env(env: VecEnv) -> VecEnvState:
    """
    :param env: a VecEnv, wrapped or not
    :return: its state
    """
    layers = list(_vec_layers(env))
    reasons: list[str] = []
    states: list[bytes | None] = []
    for layer in layers:
        try:
            states.append(_capture([layer]))
        except NotCapturableError as error:
            states.append(None)
            reasons.append(str(error))
    envs = None
    try:
        envs = _capture_envs(layers[-1])
    except NotCapturableError as error:
        reasons.append(str(error))
    return VecEnvState(_class_names(layers), env.num_envs, states, envs, "; ".join(reasons) or None)


def restore_vec_env(env: VecEnv, state: VecEnvState) -> None:
    """
    Put a VecEnv, made as the captured one was, into its state, as far as that was captured.

    :param env: VecEnv with the same wrappers
    :param state: what :func:`capture_vec_env` returned
    :raises CheckpointError: if the wrappers or environments are not the same
    """
    layers = list(_vec_layers(env))
    if _class_names(layers) != state.classes:
        raise CheckpointError(
            f"env: the checkpoint was written with {' of '.join(state.classes)}, got {' of '.join(_class_names(layers))}; "
            "wrap the environment as in the interrupted run."
        )
    if env.num_envs != state.n_envs:
        raise CheckpointError(f"env: the checkpoint was written with {state.n_envs} environments, got {env.num_envs}.")
    for layer, captured in zip(layers, state.layers, strict=True):
        if captured is not None:
            _restore([layer], captured)
    if state.envs is not None:
        _restore_envs(layers[-1], state.envs)


def capture_env(env: gym.Env) -> bytes:
    """
    :param env: an environment, wrapped or not
    :return: its state and its wrappers'
    :raises NotCapturableError: if the state can't be captured
    """
    layers, own = _env_layers(env)
    base = layers[-1]
    data = _mujoco_data(base)
    if own is None and data is None and isinstance(base, EzPickle):
        raise NotCapturableError(f"{type(base).__name__} pickles without its state (EzPickle)")
    extra: Any = None
    if own is not None:
        extra = own.capture_state()  # type: ignore[attr-defined]
        if isinstance(extra, NotCapturableError):
            raise extra
    elif data is not None:
        # with derived quantities, which rewards may read before the next step computes them anew
        extra = pickle.dumps(data, protocol=5)
    return _capture(layers, extra)


def restore_env(env: gym.Env, state: bytes) -> None:
    """
    :param env: environment made as the captured one was
    :param state: what :func:`capture_env` returned
    :raises CheckpointError: if the wrappers or the environment are not the same
    """
    layers, own = _env_layers(env)
    extra = _restore(layers, state)
    if own is not None:
        own.restore_state(extra)  # type: ignore[attr-defined]
    elif extra is not None:
        import mujoco

        base: Any = layers[-1]
        mujoco.mj_copyData(base.data, base.model, pickle.loads(extra))


def _capture_envs(base: VecEnv) -> list[bytes]:
    if isinstance(base, DummyVecEnv):
        return [capture_env(env) for env in base.envs]
    if isinstance(base, SubprocVecEnv) and base.has_attr("capture_state"):
        states = base.env_method("capture_state")
        for state in states:
            if isinstance(state, NotCapturableError):
                raise state
        return states
    remedy = ": wrap its environments in CapturableEnv" if isinstance(base, SubprocVecEnv) else ""
    raise NotCapturableError(f"{type(base).__name__} gives no access to its environments{remedy}")


def _restore_envs(base: VecEnv, states: list[bytes]) -> None:
    for i, state in enumerate(states):
        if isinstance(base, DummyVecEnv):
            restore_env(base.envs[i], state)
        else:
            base.env_method("restore_state", state, indices=i)


def _vec_layers(env: VecEnv) -> Iterator[VecEnv]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv
    yield env


def _env_layers(env: gym.Env) -> tuple[list[gym.Env], gym.Env | None]:
    """The layers from the outside in, down to the first that captures itself and all below it, which comes second."""
    layers = [env]
    while not hasattr(type(layers[-1]), "capture_state"):
        if not isinstance(layers[-1], gym.Wrapper):
            return layers, None
        layers.append(layers[-1].env)
    return layers, layers[-1]


def _mujoco_data(env: gym.Env) -> Any:
    data = vars(env).get("data")
    return data if type(data).__name__ == "MjData" and hasattr(env, "model") else None


def _class_names(layers: Sequence[Any]) -> list[str]:
    # importing rl-zoo3 puts a subclass in the place of Gymnasium's TimeLimit, with the same state
    return [type(layer).__name__.replace("PatchedTimeLimit", "TimeLimit") for layer in layers]


class _Pickler(pickle.Pickler):
    """Leaves out the layers themselves, and refuses what would lose its state silently."""

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file, protocol=5)
        self.places = {id(layer): i for i, layer in enumerate(layers)}

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, EzPickle) and id(obj) not in self.places:
            raise NotCapturableError(f"{type(obj).__name__} pickles without its state (EzPickle)")
        return self.places.get(id(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, layers: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self.layers = layers

    def persistent_load(self, pid: Any) -> Any:
        return self.layers[pid]


def _attributes(layer: Any) -> dict[str, Any]:
    if isinstance(layer, VecEnv) and not isinstance(layer, VecEnvWrapper):
        return {name: vars(layer)[name] for name in VEC_ENV_NAMES if name in vars(layer)}
    if hasattr(type(layer), "capture_state"):
        return {}
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in STATIC_NAMES
        and not isinstance(value, STATIC_TYPES)
        and not type(value).__module__.startswith(STATIC_MODULES)
    }


def _capture(layers: Sequence[Any], extra: Any = None) -> bytes:
    attributes = [_attributes(layer) for layer in layers]
    try:
        # all at once: what layers share stays shared
        return _dump((_class_names(layers), attributes, extra), layers)
    except NotCapturableError:
        raise
    except Exception as error:
        # pickling fails in as many ways as there are classes
        for layer, values in zip(layers, attributes, strict=True):
            for name, value in values.items():
                try:
                    _dump(value, layers)
                except Exception as cause:
                    raise NotCapturableError(f"{type(layer).__name__}.{name} can't be pickled ({cause})") from cause
        raise NotCapturableError(f"{_class_names(layers)[-1]} can't be pickled ({error})") from error


def _dump(value: Any, layers: Sequence[Any]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, layers).dump(value)
    return file.getvalue()


def _restore(layers: Sequence[Any], state: bytes) -> Any:
    classes, attributes, extra = _Unpickler(state, layers).load()
    if classes != _class_names(layers):
        raise CheckpointError(
            f"env: the checkpoint was written with {' of '.join(classes)}, got {' of '.join(_class_names(layers))}; "
            "make and wrap the environment as in the interrupted run."
        )
    for layer, values in zip(layers, attributes, strict=True):
        live = vars(layer)
        for name, value in values.items():
            if isinstance(value, spaces.Space) and isinstance(live.get(name), spaces.Space):
                # models and wrappers hold on to the live space: only its random state is put back
                copy_random_state(value, live[name])
            else:
                live[name] = value
    return extra


def copy_random_state(source: spaces.Space, target: spaces.Space) -> None:
    """
    :param source: a space
    :param target: an equal space, which from now on samples what the source would have
    """
    target._np_random = source._np_random
    for part, other in zip(_parts(source), _parts(target), strict=True):
        copy_random_state(part, other)


def _parts(space: spaces.Space) -> Iterator[spaces.Space]:
    for value in vars(space).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        yield from (part for part in values if isinstance(part, spaces.Space))
