"""The data of a model's offline phase: loading it, its place among the buffers, its share of the batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_consistency.data.buffer import BlockWriter, Segment, block_rows, converted_episodes, fill, set_size
from sb3_consistency.data.checks import DatasetError, map_observations
from sb3_consistency.data.converter import EpisodeConverter
from sb3_consistency.data.environment import environment_differs
from sb3_consistency.data.episodes import Block, EpisodeSource
from sb3_consistency.data.opening import open_datasets
from sb3_consistency.data.rewards import RewardFunction, fit_reward_transform
from sb3_consistency.data.selection import hold_out, select_episodes
from sb3_consistency.data.statistics import ObservationStatistics, fit_vec_normalize
from sb3_consistency.policies.modules import in_parts
from sb3_consistency.training.batches import Batch, can_sample, concatenate, sample, split
from sb3_consistency.training.windows import WindowRows, Windows, chunk_batch

# rows of the held-out data that are evaluated, evenly spread
HELDOUT_ROWS, HELDOUT_PART = 8192, 1024
# up to so many it is looked whether there is a full window; with more, that there is none is an error of the horizon
FEW_ROWS = 10_000
# what of it a checkpoint holds, beside the buffer and the held-out episodes
FACTS = ("segments", "in_replay", "of_constructor")


class OfflineData:
    """
    The offline data of an algorithm: fills its replay buffer from datasets, and keeps them when it goes online.

    In the offline phase SB3's ``replay_buffer`` holds the data; with the first online step it moves to a buffer of its own,
    out of the way of SB3's circular overwriting. None of it is saved with a model.

    :param model: the algorithm
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        #: the data, once it has a buffer of its own
        self.separate: ReplayBuffer | None = None
        #: whether the replay buffer holds the data
        self.in_replay = False
        self.segments: list[Segment] = []
        self.heldout: dict[str, Any] | None = None
        #: whether it is the constructor's ``dataset``
        self.of_constructor = False
        #: whether ``dataset`` was set anew since data was loaded
        self.outdated = False

    @property
    def buffer(self) -> ReplayBuffer | None:
        """The data, wherever it lies; None if there is none."""
        return self.model.replay_buffer if self.in_replay else self.separate

    # loading

    def load_of_constructor(self) -> None:
        """Load the constructor's ``dataset``, if there is one, unless it is loaded, or other data in its place."""
        model = self.model
        if model.dataset is not None and (self.outdated or (not self.of_constructor and self.buffer is None)):
            model.load_dataset(model.dataset, **(model.dataset_kwargs or {}))
            self.of_constructor = True

    def load(
        self,
        dataset: Any,
        *,
        weights: Sequence[float] | None = None,
        episodes: slice | Iterable[int] | None = None,
        top_fraction: float = 1.0,
        heldout_fraction: float = 0.0,
        reward_transform: str | RewardFunction = "none",
        progress_bar: bool = False,
    ) -> int:
        """See :meth:`GenerativeAlgorithm.load_dataset`."""
        model = self.model
        if not 0 < top_fraction <= 1:
            raise ValueError(f"top_fraction must be in (0, 1], got {top_fraction}.")
        if not 0 <= heldout_fraction < 1:
            raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}.")
        if episodes is not None and not isinstance(episodes, slice):
            episodes = np.asarray(list(episodes) if isinstance(episodes, Iterable) else [episodes])
        sources = open_datasets(dataset)
        self._check_recorded(sources, reward_transform)
        shares = self._check_weights(weights, len(sources))
        converters = [EpisodeConverter(s, model.observation_space, model.action_space) for s in sources]
        chosen = [select_episodes(source, episodes, top_fraction) for source in sources]
        held = [hold_out(c, heldout_fraction) for c in chosen]
        chosen = [np.setdiff1d(c, h) for c, h in zip(chosen, held, strict=True)]
        if any(len(c) == 0 for c in chosen):
            raise DatasetError(f"heldout_fraction={heldout_fraction} leaves no episode to train on: the dataset is too small.")

        sizes = [int(source.lengths[c].sum()) for source, c in zip(sources, chosen, strict=True)]
        if min(sizes) < model.n_envs:
            raise DatasetError(
                f"{sources[int(np.argmin(sizes))].name} has fewer transitions than environments ({model.n_envs})."
            )
        n_rows = sum(block_rows(size, model.n_envs) for size in sizes)
        size = (n_rows + int(model.optimize_memory_usage)) * model.n_envs
        buffer = model.new_buffer(size if model.keep_offline else max(size, model.buffer_size))
        statistics = ObservationStatistics(model.observation_space)
        ranges = fill(buffer, converters, chosen, sizes, statistics, progress_bar)
        for converter, size in zip(converters, sizes, strict=True):
            converter.warn_if_clipped(size)
        returns = np.concatenate([s.returns[c] for s, c in zip(sources, chosen, strict=True)])
        reward_function = self._transform_rewards(buffer, n_rows, reward_transform, returns)
        heldout = self.read_heldout(converters, held)

        with self.kept_on_error():
            self.install(buffer)
            self.outdated = False
            # without weights there are no shares, and no segments
            self.segments = [Segment(*rows, share) for rows, share in zip(ranges, shares, strict=False)]
            self.heldout = heldout
            former, model.run.reward_function = model.run.reward_function, reward_function
            model.run.reference_returns = sources[0].reference_returns
            self._transform_experience(former, reward_function)
            if model._n_updates == 0:
                self._fit_statistics(statistics, buffer, n_rows)
        return sum(sizes)

    def _check_recorded(self, sources: list[EpisodeSource], reward_transform: str | RewardFunction) -> None:
        """Whether rewards were recorded where they are needed, and in which environment."""
        model = self.model
        needed_by = type(model).__name__ if model.needs_rewards else None
        if reward_transform != "none":
            needed_by = f"reward_transform={reward_transform!r}"
        for source in sources:
            if needed_by is not None:
                source.require_rewards(needed_by)
            difference = environment_differs(source, model.env)
            if difference is not None:
                warnings.warn(difference, stacklevel=4)

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Within this context, an error leaves data and buffers as they were."""
        model = self.model
        # SB3's users delete a buffer before they load another
        mine, buffer = dict(vars(self)), vars(model).get("replay_buffer")
        run = (model.run.reward_function, model.run.reference_returns)
        try:
            yield
        except BaseException:
            vars(self).update(mine)
            model.replay_buffer = buffer
            model.run.reward_function, model.run.reference_returns = run
            raise

    def _check_weights(self, weights: Sequence[float] | None, n_datasets: int) -> list[float]:
        if weights is None:
            return []
        if len(weights) != n_datasets or not all(0 <= w < math.inf for w in weights) or sum(weights) <= 0:
            raise ValueError(f"weights must be {n_datasets} numbers >= 0, one per dataset and not all 0, got {list(weights)}.")
        if isinstance(self.model.replay_buffer, HerReplayBuffer):
            raise ValueError("weights can't be used with HerReplayBuffer, which samples whole episodes itself.")
        return [weight / sum(weights) for weight in weights]

    def _transform_rewards(
        self, buffer: ReplayBuffer, n_rows: int, transform: str | RewardFunction, returns: np.ndarray
    ) -> RewardFunction | None:
        rewards = buffer.rewards[:n_rows]
        function = fit_reward_transform(transform, rewards, returns)
        if function is None:
            return None
        if self.model._vec_normalize_env is not None and self.model._vec_normalize_env.norm_reward:
            raise ValueError("reward_transform can't be combined with VecNormalize(norm_reward=True): both rescale rewards.")
        if isinstance(buffer, HerReplayBuffer):
            raise ValueError("reward_transform can't be used with HerReplayBuffer, which asks the environment for rewards.")
        transformed = np.asarray(function(rewards.copy()), dtype=np.float32)
        if transformed.shape != rewards.shape or not np.isfinite(transformed).all():
            raise ValueError(
                f"reward_transform must return finite rewards in the shape it got, {rewards.shape}; got {transformed.shape}."
            )
        buffer.rewards[:n_rows] = transformed
        return function

    def _transform_experience(self, former: RewardFunction | None, function: RewardFunction | None) -> None:
        """Rewards of online experience that is already there, as those that come from now on."""
        online = self.model.replay_buffer
        if self.in_replay or online is None or online.size() == 0 or former == function:
            return
        rewards = online.rewards[: online.size()]
        if former is not None:
            # a function that went through a file is another object
            if function is not None and np.allclose(former(rewards.copy()), function(rewards.copy())):
                return
            raise ValueError(
                f"reward_transform: the replay buffer holds online experience with rewards that {former} transformed: load "
                "the data with the same, or empty the buffer before (model.replay_buffer.reset())."
            )
        assert function is not None
        rewards[:] = function(rewards.copy())

    def read_heldout(self, converters: list[EpisodeConverter], held: list[np.ndarray]) -> dict[str, Any] | None:
        """
        :param converters: of every dataset
        :param held: numbers of the held-out episodes, of every dataset
        :return: their transitions, with ``starts`` at the first of every episode, and ``rewards`` None where they were not
            recorded; None if nothing is held out
        :raises DatasetError: if they are too short for the windows of every environment
        """
        episodes = [e for converter, h in zip(converters, held, strict=True) for e in converted_episodes(converter, h)]
        if not episodes:
            return None
        if self.model.has_windows:
            return {"windows": self._heldout_windows(episodes)}

        def joined(name: str) -> Any:
            return map_observations(lambda *parts: np.concatenate(parts), *(getattr(e, name) for e in episodes))

        names = ("observations", "actions", "next_observations", "terminations")
        recorded = all(converter.source.has_rewards for converter in converters)
        return {
            **{name: joined(name) for name in names},
            "rewards": joined("rewards") if recorded else None,
            "starts": joined("steps") == 0,
        }

    def _heldout_windows(self, episodes: list[Block]) -> Windows:
        """Held-out episodes keep their order, in a buffer of their own: windows are taken from it."""
        model, size = self.model, sum(len(e) for e in episodes)
        if size < model.n_envs:
            raise DatasetError(
                f"heldout_fraction: the held-out episodes have {size} transition(s), fewer than there are environments "
                f"({model.n_envs}), each of which gets windows: hold out more, or use fewer environments."
            )
        rows = block_rows(size, model.n_envs)
        buffer = model.new_buffer((rows + int(model.optimize_memory_usage)) * model.n_envs)
        writer = BlockWriter(buffer, 0, size)
        for episode in episodes:
            writer.write(episode)
        set_size(buffer, rows)
        windows = self.windows_of(buffer)
        windows.check()
        return windows

    def windows_of(self, buffer: ReplayBuffer) -> Windows:
        """
        :param buffer: data
        :return: its windows, as the model's horizon and history want them
        """
        return Windows(buffer, self.model.horizon, self.model.history, self.model.pad)

    def install(self, buffer: ReplayBuffer) -> None:
        """
        :param buffer: data to take from now on
        :raises DatasetError: if no episode is long enough for a window, and ``pad`` is off
        """
        model = self.model
        if model.has_windows:
            self.windows_of(buffer).check()
        if model.replay_buffer is not None and model.replay_buffer.size() > 0 and not self.in_replay:
            self.separate = buffer
        else:
            model.replay_buffer, self.separate, self.in_replay = buffer, None, True

    def _fit_statistics(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        vec_normalize = self.model._vec_normalize_env
        if self.model.normalize_observations and not (vec_normalize is not None and vec_normalize.norm_obs):
            self.fit_normalizer(statistics, buffer, n_rows)
        if vec_normalize is not None and vec_normalize.training:
            fit_vec_normalize(vec_normalize, statistics, buffer.rewards[:n_rows], buffer.dones[:n_rows])

    def fit_normalizer(self, statistics: ObservationStatistics, buffer: ReplayBuffer, n_rows: int) -> None:
        """
        :param statistics: of the observations
        :param buffer: the data
        :param n_rows: how many rows of it are filled
        """
        self.model.policy.fit_normalizer(statistics.mean, statistics.std)

    @th.no_grad()
    def heldout_loss(self) -> float:
        """
        :return: behaviour-cloning loss of the held-out episodes at the end of the curriculum, with one noise at every call
        """
        model = self.model
        model.policy.set_training_mode(False)
        obs, actions = self._heldout_tensors()
        generator = th.Generator().manual_seed(0)
        actor = getattr(model.policy, model.cloning_network)
        noise = th.randn(actions.shape, generator=generator).to(model.device)
        u = th.rand(len(actions), actor.model.n_uniforms, generator=generator).to(model.device)

        def loss(rows: Any) -> th.Tensor:
            losses: th.Tensor = actor.model.loss(
                rows["actions"], actor.features(rows["obs"]), noise=rows["noise"], u=rows["u"]
            )
            return losses

        whole: Any = {"actions": actions, "obs": obs, "noise": noise, "u": u}
        # thousands of images at once would need a gigabyte
        return float(in_parts(loss, whole, HELDOUT_PART).mean())

    def _heldout_tensors(self) -> tuple[Any, th.Tensor]:
        model, heldout = self.model, self.heldout
        assert heldout is not None
        if "windows" in heldout:
            windows = heldout["windows"]
            batch = chunk_batch(windows, spread_windows(windows), model.gamma, model._vec_normalize_env, augment=False)
            return batch.observations, batch.actions
        rows = np.linspace(0, len(heldout["actions"]) - 1, min(HELDOUT_ROWS, len(heldout["actions"]))).astype(int)
        taken = map_observations(lambda x: x[rows], heldout["observations"])
        return heldout_tensor(model, taken), th.as_tensor(heldout["actions"][rows], device=model.device)

    # going online

    def begin_online(self) -> None:
        """Keep the data out of the way of SB3's circular overwriting, and start a fresh buffer."""
        model = self.model
        if self.in_replay and model.keep_offline:
            self.separate, model.replay_buffer = model.replay_buffer, model.new_buffer(model.buffer_size)
            self.in_replay = False
        elif self.in_replay and model.replay_buffer is not None:
            # one buffer: SB3's overwriting sets in once it is full, and the rows of a dataset no longer stay together
            self.in_replay = False
            self.segments = []

    def take_segments(self, segments: Sequence[Sequence[Any]]) -> None:
        """
        :param segments: those of offline data that was put into the replay buffer
        """
        self.separate, self.in_replay = None, True
        self.segments = [Segment(*segment) for segment in segments]

    # batches

    def sample(self, n_batches: int, batch_size: int) -> list[Any]:
        """
        :param n_batches: number of batches
        :param batch_size: rows of each
        :return: batches of offline and online data
        """
        model = self.model
        n_offline = self._offline_share(batch_size)
        parts: list[list[Batch]] = []
        for buffer, size in ((model.replay_buffer, batch_size - n_offline), (self.separate, n_offline)):
            if size > 0 and buffer is not None:
                segments = self.segments if buffer is self.buffer else None
                parts.append(split(self._drawn(buffer, n_batches * size, segments), n_batches))
        return parts[0] if len(parts) == 1 else concatenate(*parts)

    def _drawn(self, buffer: ReplayBuffer, size: int, segments: list[Segment] | None) -> Batch:
        model = self.model
        if isinstance(buffer, NStepReplayBuffer) and model.run.n_step_class_is_derived:
            # made by the model, which may have been told others since
            buffer.n_steps, buffer.gamma = model.n_steps, model.gamma
        if not model.has_windows:
            return sample(buffer, size, model.gamma, model._vec_normalize_env, segments)
        windows = self.windows_of(buffer)
        return chunk_batch(windows, windows.sample(size, segments), model.gamma, model._vec_normalize_env)

    def can_sample(self, buffer: ReplayBuffer | None) -> bool:
        """
        :param buffer: a replay buffer, or None
        :return: whether it has anything to learn from
        """
        if buffer is None or not can_sample(buffer):
            return False
        if not self.model.has_windows or self.model.pad or buffer.size() > FEW_ROWS:
            return True
        return len(self.windows_of(buffer)) > 0

    def _offline_share(self, batch_size: int) -> int:
        """How many rows of a batch come from the separate offline buffer."""
        separate, replay, fraction = self.separate, self.model.replay_buffer, self.model.offline_fraction
        if separate is None or not self.can_sample(separate):
            return 0
        if not self.can_sample(replay):
            return batch_size
        if fraction is None:
            # drawn, not rounded: a few online transitions among many offline ones must get their turn
            return int(np.random.binomial(batch_size, separate.size() / (separate.size() + replay.size())))
        share = fraction(self.model._current_progress_remaining) if callable(fraction) else fraction
        return round(batch_size * min(max(share, 0.0), 1.0))

    # what checkpoints hold of it

    def facts(self) -> dict[str, Any]:
        """
        :return: what a checkpoint holds beside the data itself
        """
        return {name: getattr(self, name) for name in FACTS}

    def restore(self, buffer: ReplayBuffer, heldout: dict[str, Any] | None) -> None:
        """
        :param buffer: the data, as a checkpoint has it, whose :meth:`facts` are set
        :param heldout: the held-out episodes
        """
        if self.in_replay:
            self.model.replay_buffer, self.separate = buffer, None
        else:
            self.separate = buffer
        self.heldout = heldout


def spread_windows(windows: Windows) -> WindowRows:
    """
    :param windows: of held-out episodes
    :return: at most :data:`HELDOUT_ROWS` of them, evenly spread
    """
    starts = windows.starts
    return windows.at(starts[np.linspace(0, len(starts) - 1, min(HELDOUT_ROWS, len(starts))).astype(int)])


def heldout_tensor(model: Any, observations: Any) -> Any:
    """
    :param model: the algorithm
    :param observations: of held-out episodes, arrays (N, ...)
    :return: the same as its networks take them
    """
    if model._vec_normalize_env is not None:
        observations = model._vec_normalize_env.normalize_obs(observations)
    return model.policy.obs_to_tensor(observations)[0]
