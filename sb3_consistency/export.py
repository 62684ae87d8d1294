"""A trained policy as one file that needs neither Stable-Baselines3 nor, as ONNX, PyTorch."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_consistency.common.networks import GenerativeActor

SUFFIXES = (".onnx", ".pt2", ".pt")


class ExportedPolicy(nn.Module):
    """
    The actor alone, from observations as the environment gives them to actions as it takes them.

    Normalisation of observations and unscaling of actions are inside; there are no candidates and no critics.

    :param actor: trained actor
    :param vec_normalize: statistics of the environment that the actor was trained in, if it normalised observations
    :param deterministic: start from the fixed noise of ``predict(deterministic=True)``, and take none as an input
    """

    fixed_noise: th.Tensor
    low: th.Tensor
    high: th.Tensor
    middle: th.Tensor
    half_range: th.Tensor

    def __init__(self, actor: GenerativeActor, vec_normalize: VecNormalize | None = None, deterministic: bool = True) -> None:
        super().__init__()
        self.actor = actor
        self.deterministic = deterministic
        self.keys = list(actor.observation_space.spaces) if isinstance(actor.observation_space, spaces.Dict) else [""]
        space = actor.action_space
        assert isinstance(space, spaces.Box)
        self.register_buffer("low", th.as_tensor(space.low, dtype=th.float32).flatten())
        self.register_buffer("high", th.as_tensor(space.high, dtype=th.float32).flatten())
        low, high = (bound.astype(np.float64).flatten() / 2 for bound in (space.low, space.high))
        self.register_buffer("middle", th.as_tensor(low + high, dtype=th.float32))
        self.register_buffer("half_range", th.as_tensor(high - low, dtype=th.float32))
        self.action_shape = space.shape
        # (1, S, A): the batch comes first here, so that every input has its rows in one place
        self.register_buffer("fixed_noise", actor.fixed_noise.transpose(0, 1).clone())
        self.normalisation = nn.ModuleList(_VecNormalisation.of(vec_normalize, key) for key in self.keys)

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: observation, (B, *shape), or one per key of a Dict space in its order; then, if not deterministic,
            standard normal noise, (B, S, A) for S network passes
        :return: actions, (B, *action shape), within the bounds of the action space
        """
        observations = [normalise(x) for normalise, x in zip(self.normalisation, inputs, strict=False)]
        obs = dict(zip(self.keys, observations, strict=True)) if self.keys != [""] else observations[0]
        features = self.actor.features(obs)
        noise = self.fixed_noise.expand(features.shape[0], -1, -1) if self.deterministic else inputs[-1]
        actions = self.actor.model.sample(noise.transpose(0, 1), features)
        unscaled = (self.middle + self.half_range * actions).clamp(self.low, self.high)
        return unscaled.unflatten(1, self.action_shape)

    def example_inputs(self, batch_size: int) -> tuple[th.Tensor, ...]:
        """
        :param batch_size: number of rows
        :return: inputs of :meth:`forward` with the right shapes and types
        """
        space = self.actor.observation_space
        parts = [space[key] for key in self.keys] if isinstance(space, spaces.Dict) else [space]
        rows = [th.as_tensor(np.stack([part.sample() for _ in range(batch_size)])) for part in parts]
        rows = [x.float() if x.is_floating_point() else x for x in rows]
        return (*rows, *([] if self.deterministic else [th.randn(batch_size, *self.fixed_noise.shape[1:])]))

    def input_names(self) -> list[str]:
        """
        :return: names of the inputs: "observation" or the keys of the Dict space, and "noise"
        """
        return [*(key or "observation" for key in self.keys), *([] if self.deterministic else ["noise"])]


class _VecNormalisation(nn.Module):
    mean: th.Tensor
    scale: th.Tensor

    def __init__(self, mean: np.ndarray, variance: np.ndarray, epsilon: float, limit: float) -> None:
        super().__init__()
        self.register_buffer("mean", th.as_tensor(mean, dtype=th.float32))
        self.register_buffer("scale", th.as_tensor(1 / np.sqrt(variance + epsilon), dtype=th.float32))
        self.limit = limit

    @classmethod
    def of(cls, env: VecNormalize | None, key: str) -> nn.Module:
        if env is None or not env.norm_obs or (key and key not in (env.norm_obs_keys or [])):
            return nn.Identity()
        statistics: Any = env.obs_rms[key] if isinstance(env.obs_rms, dict) else env.obs_rms
        return cls(statistics.mean, statistics.var, env.epsilon, env.clip_obs)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return ((x - self.mean) * self.scale).clamp(-self.limit, self.limit)


def export_policy(model: Any, path: str | Path, deterministic: bool = True) -> Path:
    """
    Write a model's actor to a file, with a dynamic batch size.

    The suffix says which: ".onnx" (for ONNX Runtime and others), ".pt2" (``torch.export``) or ".pt" (TorchScript).
    The file computes what ``predict`` does for the same noise, without candidates; see :class:`ExportedPolicy` for
    its inputs (images with their channels first, as the networks take them). A ``VecNormalize`` environment's
    statistics go into the file.

    :param model: trained model
    :param path: file to write
    :param deterministic: start from the fixed noise of ``predict(deterministic=True)``; else noise is an input
    :return: the path
    :raises ValueError: if the suffix is unknown, or the model has no generative actor
    :raises ImportError: if a library that writes the format is missing
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: the suffix must be one of {SUFFIXES}, got {str(path)!r}.")
    actor = getattr(model.policy, "actor", None)
    if not isinstance(actor, GenerativeActor):
        raise ValueError(
            f"model: {type(model).__name__} has no generative actor; planners and other libraries' can't be exported."
        )
    device, training = actor.device, actor.training
    policy = ExportedPolicy(actor, model.get_vec_normalize_env(), deterministic).cpu().eval()
    try:
        with th.no_grad():
            # two rows: a batch of one would be taken for a constant; one call first, to make what is made only once
            inputs = policy.example_inputs(2)
            policy(*inputs)
            _write(policy, inputs, path)
    finally:
        actor.to(device).train(training)
    return path


def _write(policy: ExportedPolicy, inputs: tuple[th.Tensor, ...], path: Path) -> None:
    if path.suffix == ".pt":
        with warnings.catch_warnings():
            # TorchScript's deprecation, and shapes that are meant to stay numbers: the sampler's number of steps
            warnings.simplefilter("ignore")
            th.jit.trace(policy, inputs).save(str(path))
        return
    batch = th.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)
    program = th.export.export(policy, inputs, dynamic_shapes=shapes)
    if path.suffix == ".pt2":
        th.export.save(program, path)
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error.name} is needed to write ONNX: pip install "sb3-consistency[export]".') from error
    # it would list the operators of other libraries that are not installed
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    th.onnx.export(
        program,
        f=str(path),
        input_names=policy.input_names(),
        output_names=["action"],
        external_data=False,
        verbose=False,
    )
