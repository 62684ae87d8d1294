"""Record what a policy does in an environment as a Minari dataset."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from tqdm.auto import tqdm

from sb3_consistency.data.checks import as_count
from sb3_consistency.data.formats.minari import check_new_dataset_id, writing_dataset
from sb3_consistency.envs.wrappers import flatten_nested
from sb3_consistency.registry import how_to_install

if TYPE_CHECKING:
    import minari

# maps an observation to an action (both unscaled); if it has a method reset(), that is called before every episode
Controller = Callable[[Any], np.ndarray]


def record_dataset(
    dataset_id: str,
    env: gym.Env | str,
    controllers: Controller | list[Controller],
    n_steps: int,
    *,
    seed: int = 0,
    description: str | None = None,
    algorithm_name: str | None = None,
    overwrite: bool = False,
    progress_bar: bool = False,
) -> minari.MinariDataset:
    """
    Roll controllers out in turn, one episode each, and save the episodes as a local Minari dataset.

    :param dataset_id: id of the new dataset, like "mine/pendulum/mixed-v0"
    :param env: environment (or its id) with a time limit
    :param controllers: one controller, or several that take turns by episode; one that remembers what it saw has a method
        ``reset()``, called before every episode
    :param n_steps: steps to record, at least 1; the last episode is cut there and marked truncated
    :param seed: seed of the first episode
    :param description: description stored with the data
    :param algorithm_name: name of the behaviour stored with the data
    :param overwrite: replace a local dataset of this id
    :param progress_bar: show a progress bar
    :return: the dataset
    :raises ImportError: if Minari is not installed
    :raises DatasetError: if the id is no Minari id, or exists and ``overwrite`` is not set
    :raises TypeError: if ``n_steps`` is not whole
    :raises ValueError: if it is not positive
    """
    try:
        import minari
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise ImportError(f"Recording needs Minari: {how_to_install('offline')}.") from error
    check_new_dataset_id(dataset_id, overwrite)
    n_steps = as_count("n_steps", n_steps, at_least=1)
    env = gym.make(env) if isinstance(env, str) else env
    named = _describe_env(env)  # before the work, so that nothing recorded is lost
    controllers = controllers if isinstance(controllers, list) else [controllers]
    buffers: list[dict[str, Any]] = []
    n_recorded = 0
    with tqdm(total=n_steps, desc="Recording", unit="step", disable=not progress_bar) as bar:
        while n_recorded < n_steps:
            controller = controllers[len(buffers) % len(controllers)]
            buffers.append(_record_episode(env, controller, seed + len(buffers), n_steps - n_recorded))
            n_recorded += len(buffers[-1]["rewards"])
            bar.update(len(buffers[-1]["rewards"]))
    with warnings.catch_warnings(), writing_dataset(dataset_id, overwrite) as unfinished:
        # Minari asks for an author, an e-mail address and a permalink
        warnings.filterwarnings("ignore", message=".*is set to None.*", category=UserWarning)
        minari.create_dataset_from_buffers(
            unfinished,
            [EpisodeBuffer(**buffer) for buffer in buffers],
            **named,
            algorithm_name=algorithm_name,
            description=description,
        )
    return minari.load_dataset(dataset_id)


def _describe_env(env: gym.Env) -> dict[str, Any]:
    """How Minari is told of the environment: itself where it can be made again, else its spaces."""
    try:
        if env.spec is None:
            raise ValueError("it has none")
        env.spec.to_json()
    except ValueError as error:
        warnings.warn(
            f"The dataset will not name its environment, which can't be made again from its spec ({error}); "
            "load it with from_dataset(..., env=...).",
            stacklevel=3,
        )
        return {"observation_space": env.observation_space, "action_space": env.action_space}
    return {"env": env}


def _record_episode(env: gym.Env, controller: Controller, seed: int, max_steps: int) -> dict[str, Any]:
    observation, _ = env.reset(seed=seed)
    if hasattr(controller, "reset"):
        controller.reset()
    # copied: some environments hand out the same arrays at every step
    observations: list[Any] = [deepcopy(observation)]
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    terminations: list[bool] = []
    truncations: list[bool] = []
    done = False
    while not done and len(rewards) < max_steps:
        action = controller(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(deepcopy(observation))
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(terminated)
        truncations.append(truncated)
        done = terminated or truncated
    truncations[-1] = truncations[-1] or not done
    return {
        "seed": seed,
        "observations": _transpose(observations),
        "actions": actions,
        "rewards": rewards,
        "terminations": terminations,
        "truncations": truncations,
    }


def _transpose(observations: list[Any]) -> Any:
    """From a list of (nested dict) observations to a (nested dict of) list, as Minari stores them."""
    if isinstance(observations[0], dict):
        return {key: _transpose([o[key] for o in observations]) for key in observations[0]}
    return observations


class _ModelController:
    """Acts as a model does, and hands it back what it remembers."""

    def __init__(self, model: Any, deterministic: bool, noise: float, seed: int, vec_normalize: VecNormalize | None) -> None:
        self.model, self.deterministic, self.noise, self.vec_normalize = model, deterministic, noise, vec_normalize
        self.rng = np.random.default_rng(seed)
        self.nested = isinstance(model.observation_space, spaces.Dict)
        self.reset()

    def reset(self) -> None:
        self.state, self.starts = None, np.array([True])

    def __call__(self, observation: Any) -> np.ndarray:
        observation = flatten_nested(observation) if self.nested else observation
        observation = observation if self.vec_normalize is None else self.vec_normalize.normalize_obs(observation)
        action, self.state = self.model.predict(observation, self.state, self.starts, self.deterministic)
        self.starts = np.array([False])
        if self.noise == 0:
            return action
        low, high = self.model.action_space.low, self.model.action_space.high
        noisy = action + self.noise * (high - low) / 2 * self.rng.standard_normal(action.shape)
        return np.clip(noisy, low, high).astype(self.model.action_space.dtype)


def model_controller(
    model: Any,
    deterministic: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    vec_normalize: VecNormalize | None = None,
) -> Controller:
    """
    A controller that acts as an SB3 model does, with optional Gaussian noise.

    A model with a memory from step to step (a recurrent one, or one that executes chunks) is handed it back; the controller's
    ``reset()`` begins an episode.

    :param model: SB3 model
    :param deterministic: whether to predict deterministically
    :param noise: standard deviation of the noise, as a share of half the action range
    :param seed: seed of the noise
    :param vec_normalize: statistics that the model's observations were normalised with
    :return: the controller
    :raises ValueError: if the deviation is negative
    """
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}.")
    return _ModelController(model, deterministic, noise, seed, vec_normalize)


def swing_up(noise: float, seed: int) -> Controller:
    """
    Pump energy into the pendulum until it stands, then balance it.

    :param noise: standard deviation of the noise on the torque, which makes it worse
    :param seed: seed of the noise
    :return: a controller for Pendulum-v1
    """
    rng = np.random.default_rng(seed)

    def act(observation: np.ndarray) -> np.ndarray:
        cos, sin, velocity = observation
        angle = np.arctan2(sin, cos)
        energy = velocity**2 / 6 + 5 * (cos - 1)
        torque = -12 * angle - 3 * velocity if abs(angle) < 0.5 else -0.6 * np.sign(velocity + 1e-3) * energy
        return np.clip([torque + noise * rng.standard_normal()], -2, 2).astype(np.float32)

    return act
