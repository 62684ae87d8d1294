"""A trained policy as one file that needs neither Stable-Baselines3 nor, as ONNX, PyTorch."""

import io
import logging
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_consistency.data.safe_file import replacing
from sb3_consistency.envs.spaces import action_bounds
from sb3_consistency.generative.networks import elementary_mish
from sb3_consistency.policies.modules import ActingNetwork
from sb3_consistency.policies.policy import GenerativePolicy
from sb3_consistency.registry import how_to_install

SUFFIXES = (".onnx", ".pt2", ".pt")


class ExportedPolicy(nn.Module):
    """
    The actor alone, from observations as the environment gives them to actions as it takes them.

    Normalisation of observations and unscaling of actions are inside; there are no candidates, no critics and no memory: of a
    policy with a history the input has it, of one with a horizon the output is the whole chunk.

    :param actor: trained actor, or student of a planner
    :param vec_normalize: statistics of the environment that the actor was trained in, if it normalised observations
    :param deterministic: start from the fixed noise of ``predict(deterministic=True)``, and take none as an input
    """

    fixed_noise: th.Tensor
    low: th.Tensor
    high: th.Tensor
    middle: th.Tensor
    half_range: th.Tensor

    def __init__(self, actor: ActingNetwork, vec_normalize: VecNormalize | None = None, deterministic: bool = True) -> None:
        super().__init__()
        self.actor = actor
        self.deterministic = deterministic
        self.keys = list(actor.observation_space.spaces) if isinstance(actor.observation_space, spaces.Dict) else [""]
        low, high, middle, half_range = action_bounds(actor.action_space)
        self.register_buffer("low", th.as_tensor(_inward(low, np.inf)).flatten())
        self.register_buffer("high", th.as_tensor(_inward(high, -np.inf)).flatten())
        self.register_buffer("middle", th.as_tensor(middle, dtype=th.float32).flatten())
        self.register_buffer("half_range", th.as_tensor(half_range, dtype=th.float32).flatten())
        self.action_shape = low.shape
        # (1, S, *E): the batch comes first here, so that every input has its rows in one place
        noise = actor.fixed_noise(1, actor.device).expand(actor.model.noise_shape(1))
        self.register_buffer("fixed_noise", noise.transpose(0, 1).clone())
        self.normalisation = nn.ModuleList(_VecNormalisation.of(vec_normalize, key) for key in self.keys)

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: observation, (B, *shape), or one per key of a Dict space in its order, with a history (B, h, *shape);
            then, if not deterministic, standard normal noise, (B, S, H A) for S network passes (of planners (B, S, H, A))
        :return: actions, (B, *action shape), within the bounds of the action space; with a horizon (B, H, *action shape)
        """
        observations = [normalise(x) for normalise, x in zip(self.normalisation, inputs, strict=False)]
        obs = dict(zip(self.keys, observations, strict=True)) if self.keys != [""] else observations[0]
        fixed = self.fixed_noise.expand(inputs[0].shape[0], *self.fixed_noise.shape[1:])
        noise = fixed if self.deterministic else inputs[-1]
        actions = self.actor.from_noise(obs, noise.transpose(0, 1), self.deterministic)
        unscaled = (self.middle + self.half_range * actions).clamp(self.low, self.high).unflatten(2, self.action_shape)
        return unscaled if self.actor.plan_shape[0] > 1 else unscaled[:, 0]

    def example_inputs(self, batch_size: int) -> tuple[th.Tensor, ...]:
        """
        :param batch_size: number of rows
        :return: inputs of :meth:`forward` with the right shapes and types
        """
        space = self.actor.observation_space
        parts = [space[key] for key in self.keys] if isinstance(space, spaces.Dict) else [space]
        history = self.actor.history
        samples = [np.stack([part.sample() for _ in range(batch_size * history)]) for part in parts]
        rows = [th.as_tensor(x.reshape(batch_size, history, *x.shape[1:]) if history > 1 else x) for x in samples]
        rows = [x.float() if x.is_floating_point() else x for x in rows]
        return (*rows, *([] if self.deterministic else [th.randn(batch_size, *self.fixed_noise.shape[1:])]))

    def input_names(self) -> list[str]:
        """
        :return: names of the inputs: "observation" or the keys of the Dict space, and "noise"
        """
        return [*(key or "observation" for key in self.keys), *([] if self.deterministic else ["noise"])]

    @property
    def output_name(self) -> str:
        """Name of the output: "action", or "actions" of a chunk."""
        return "actions" if self.actor.plan_shape[0] > 1 else "action"


def _inward(bound: np.ndarray, towards: float) -> np.ndarray:
    """The float32 numbers next to bounds that may be float64, on the inner side."""
    rounded = bound.astype(np.float32)
    outside = rounded < bound if towards > 0 else rounded > bound
    return np.where(outside, np.nextafter(rounded, np.float32(towards)), rounded)


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


def export_policy(model: Any, path: str | Path, deterministic: bool = True, normalized_input: bool = False) -> Path:
    """
    Write a model's actor to a file, with a dynamic batch size.

    The suffix says which: ".onnx" (for ONNX Runtime and others), ".pt2" (``torch.export``) or ".pt" (TorchScript).
    The file computes what ``predict`` does for the same noise, without candidates; see :class:`ExportedPolicy` for
    its inputs (images with their channels first, as the networks take them). A ``VecNormalize`` environment's
    statistics go into the file.

    :param model: trained model
    :param path: file to write; missing folders are made
    :param deterministic: start from the fixed noise of ``predict(deterministic=True)``; else noise is an input
    :param normalized_input: the file will be given observations that are normalised already, though the model has no
        ``VecNormalize``
    :return: the path
    :raises ValueError: if the suffix is unknown, the model has no generative actor, can't act yet or plans states, lacks the
        ``VecNormalize`` that it learned with, or an observation's key is the name of an ONNX file's output or noise
    :raises ImportError: if a library that writes the format is missing
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: the suffix must be one of {SUFFIXES}, got {str(path)!r}.")
    policy = model.policy
    actor = policy.acting(deterministic) if isinstance(policy, GenerativePolicy) else getattr(policy, "actor", None)
    if not isinstance(actor, ActingNetwork):
        raise ValueError(f"model: {type(model).__name__} has no generative actor; other libraries' can't be exported.")
    if not model.can_act:
        raise ValueError(f"model: this {type(model).__name__} can't act yet: train on, into its last stage.")
    if actor.plan_shape[1] != get_action_dim(model.action_space):
        raise ValueError(
            f"model: this {type(model).__name__} plans states, which a controller tracks; plans of actions can be exported."
        )
    if model.run.in_vec_normalize and not normalized_input and model.get_vec_normalize_env() is None:
        raise ValueError(
            f"env: this {type(model).__name__} learned from observations that VecNormalize normalised, and has no such "
            "environment: load it with env=VecNormalize.load('vecnormalize.pkl', venv), whose statistics go into the file; or "
            "pass normalized_input=True, and give the file normalised observations."
        )
    exported = ExportedPolicy(actor, model.get_vec_normalize_env(), deterministic)
    names = [*exported.input_names(), exported.output_name]
    repeated = [name for name in names if names.count(name) > 1]
    if path.suffix == ".onnx" and repeated:
        raise ValueError(
            f"model: its observations have the key {repeated[0]!r}, the name of another input or of the output of an ONNX "
            "file: rename the key, or write .pt2 or .pt, whose inputs go by their order."
        )
    device, training = actor.device, actor.training
    learned = [p for p in actor.parameters() if p.requires_grad]
    try:
        with th.no_grad():
            # without gradients: the file keeps this, and its outputs are plain numbers where no_grad() is not around
            exported.cpu().eval().requires_grad_(False)
            # two rows: a batch of one would be taken for a constant; one call first, to make what is made only once
            inputs = exported.example_inputs(2)
            exported(*inputs)
            with replacing(path) as temporary:
                _write(exported, inputs, path.suffix, temporary)
    finally:
        actor.to(device).train(training)
        for parameter in learned:
            parameter.requires_grad_()
    return path


def _write(policy: ExportedPolicy, inputs: tuple[th.Tensor, ...], suffix: str, path: Path) -> None:
    # PyTorch's own files end the process where the disk is full
    buffer = io.BytesIO()
    if suffix == ".pt":
        with warnings.catch_warnings():
            # TorchScript's deprecation, and shapes that are meant to stay numbers: the sampler's number of steps
            warnings.simplefilter("ignore")
            th.jit.save(th.jit.trace(policy, inputs), buffer)
        path.write_bytes(buffer.getvalue())
        return
    batch = th.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)
    program = th.export.export(policy, inputs, dynamic_shapes=shapes)
    if suffix == ".pt2":
        th.export.save(program, buffer)
        path.write_bytes(buffer.getvalue())
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is needed to write ONNX: {how_to_install('export')}.") from error
    # it would list the operators of other libraries that are not installed
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # ONNX Runtime's own Mish takes its softplus number by number: 3 times as long for a batch
    program = program.run_decompositions({th.ops.aten.mish.default: elementary_mish})
    exported = th.onnx.export(program, verbose=False)
    assert exported is not None
    _name_ends(exported.model.graph, [*policy.input_names(), policy.output_name])
    exported.save(str(path), external_data=False)


def _name_ends(graph: Any, names: list[str]) -> None:
    """Name inputs and output; a value inside that has such a name (a key may be "linear" or "cat") gets another one."""
    ends = [*graph.inputs, *graph.outputs]
    inside = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {value.name for value in inside} | set(names)
    for value in inside:
        if value.name not in names or value in ends:
            continue
        new_name = next(name for i in count() if (name := f"{value.name}_{i}") not in taken)
        taken.add(new_name)
        is_initializer = graph.initializers.pop(value.name, None) is not None
        value.name = new_name
        if is_initializer:
            graph.initializers[new_name] = value
    for end, name in zip(ends, names, strict=True):
        end.name = name
