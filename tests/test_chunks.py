"""Chunks of actions and histories of observations, in every algorithm that chooses actions."""

import runpy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_consistency import CPQL, RACTD, ConsistencyBC, DiffusionBC, FrameReplayBuffer, load_safe, model_controller
from sb3_consistency.data import frames
from sb3_consistency.data.episodes import DatasetError
from tests.conftest import ALGORITHMS, SMALL, VectorEnv, box_env, make, make_arrays, online, trained

CHUNKING = [cls for cls in ALGORITHMS if cls is not RACTD]
chunking = pytest.mark.parametrize("cls", CHUNKING)
OBS = np.random.default_rng(0).uniform(-1, 1, (12, 2, 3)).astype(np.float32)
FEW = {"n_candidates": 3}


def few(cls):
    return {} if cls.offline_only else FEW


@chunking
def test_chunks_are_executed_and_histories_remembered(cls, tmp_path):
    model = trained(cls, horizon=4, history=2, executed_steps=3)
    model.save(tmp_path / "model")
    model.save_safe(tmp_path / "model")
    loaded = cls.load(tmp_path / "model"), load_safe(tmp_path / "model.safetensors")
    state, starts = None, np.array([False, False])
    for step, obs in enumerate(OBS[:7]):
        starts = np.array([False, step == 4])
        action, state = model.predict(obs, state, starts, deterministic=True)
        past = np.stack([OBS[max(step - 1, 0)], obs])
        past[0, 1] = obs[1] if step == 4 else past[0, 1]  # an episode's first observation is repeated
        np.testing.assert_array_equal(state.history, past.transpose(1, 0, 2))
        assert state.age.tolist() == [step % 3, (step - 4 if step >= 4 else step) % 3]
        with th.no_grad():
            fresh = model.policy.unscale_plans(model.policy.make_plans(state.history, True))
        for env in np.flatnonzero(state.age == 0):
            np.testing.assert_allclose(action[env], fresh[env, 0], atol=1e-6)
        planned = model.policy.unscale_plans(th.as_tensor(state.plan))
        np.testing.assert_allclose(action, planned[[0, 1], state.age], atol=1e-6)
    # without a state every call makes a plan, as at the start of an episode
    plan = model.plan(OBS[0], deterministic=True)
    assert plan.shape == (2, 4, 1) and model.plan(OBS[0, 0]).shape == (4, 1)
    np.testing.assert_allclose(model.predict(OBS[0], deterministic=True)[0], plan[:, 0], atol=1e-6)
    for other in loaded:
        np.testing.assert_array_equal(other.plan(OBS[0], deterministic=True), plan)
    assert np.isfinite(evaluate_policy(model, make_vec_env(box_env, n_envs=2), n_eval_episodes=2)[0])


def test_a_chunk_that_is_made_anew_at_every_step_needs_no_memory():
    model = trained(ConsistencyBC, horizon=4, executed_steps=1)
    action, state = model.predict(OBS[0], deterministic=True)
    assert state is None
    np.testing.assert_allclose(action, model.plan(OBS[0], deterministic=True)[:, 0], atol=1e-6)
    model.executed_steps = 2  # acts at once
    assert model.predict(OBS[0])[1].plan.shape == (2, 4, 1)
    with pytest.raises(ValueError, match=r"executed_steps must be in \[1, 4\], got 5"):
        model.executed_steps = 5


@pytest.mark.parametrize("cls", [CPQL, DiffusionBC])
def test_a_unet_over_the_time_of_a_chunk(cls, tmp_path):
    kwargs = {"horizon": 8, "policy_kwargs": {"network": "unet", "net_arch": {"pi": [16, 24], "qf": [16]}}}
    model = trained(cls, **kwargs)
    model.save_safe(tmp_path / "model")
    plan = load_safe(tmp_path / "model.safetensors").plan(OBS[0], deterministic=True)
    assert np.isfinite(plan).all() and plan.shape == (2, 8, 1)
    np.testing.assert_allclose(plan, model.plan(OBS[0], deterministic=True), atol=1e-6)
    with pytest.raises(ValueError, match="horizon must be a multiple of 2"):
        cls("MlpPolicy", box_env(), **{**kwargs, "horizon": 3})


def test_candidates_are_chunks():
    model = trained(CPQL, horizon=4, n_candidates=1, n_eval_candidates=20)
    candidates = model.policy.actor.fixed_noise(20, "cpu")
    obs = th.as_tensor(OBS[0, :1])
    with th.no_grad():
        chunks = model.policy.actor.model.sample(candidates, model.policy.actor.features(obs).expand(20, -1))
        values = model.policy.critic_target(obs.expand(20, -1), chunks).amin(dim=1)
    np.testing.assert_allclose(model.plan(OBS[0, 0], deterministic=True)[:, 0], chunks[values.argmax()], atol=1e-5)


@pytest.mark.parametrize("low_high", [(-1, 1), (5, 7)])
def test_chunks_lie_in_the_action_space(low_high):
    space = spaces.Box(*low_high, (2, 2), np.float32)
    arrays = {**make_arrays(action_dim=4), "action_space": space}
    arrays["actions"] = arrays["actions"].reshape(-1, 2, 2) * (low_high[1] - low_high[0]) / 2 + sum(low_high) / 2
    model = ConsistencyBC("MlpPolicy", VectorEnv(action_space=space), horizon=3, **SMALL)
    model.load_dataset(arrays)
    plan = model.pretrain(3).plan(OBS[0])
    assert plan.shape == (2, 3, 2, 2) and all(space.contains(a) for a in plan.reshape(-1, 2, 2))
    assert space.contains(model.predict(OBS[0, 0])[0])


def test_a_controller_remembers_and_forgets_with_its_episode():
    model = trained(ConsistencyBC, horizon=4)
    controller, state = model_controller(model, deterministic=True), None
    for _ in range(2):
        state = None
        for obs in OBS[:3, 0]:
            expected, state = model.predict(obs, state, deterministic=True)
            np.testing.assert_allclose(controller(obs), expected, atol=1e-6)
        controller.reset()


# what is seen

IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)


@pytest.mark.parametrize(
    ("space", "policy", "buffer"),
    [
        (IMAGE, "CnnPolicy", None),
        (IMAGE, "CnnPolicy", FrameReplayBuffer),
        (spaces.Dict({"image": IMAGE, "vector": spaces.Box(-1, 1, (2,))}), "MultiInputPolicy", None),
        (spaces.Discrete(5), "MlpPolicy", None),
    ],
)
def test_histories_of_any_observations(space, policy, buffer):
    kwargs = {"random_shift": 2} if buffer else {}
    env = make_vec_env(lambda: VectorEnv(observation_space=space), n_envs=2)
    model = online(
        CPQL, env, policy, history=3, horizon=2, replay_buffer_class=buffer, replay_buffer_kwargs=kwargs, **FEW, buffer_size=60
    )
    model.learn(24)
    assert model.n_updates > 0 and all(p.isfinite().all() for p in model.policy.parameters())
    assert np.isfinite(evaluate_policy(model, env, n_eval_episodes=2)[0])


@pytest.mark.parametrize("cls", [ConsistencyBC, RACTD])
def test_windows_of_images_are_shifted_but_not_those_held_out(cls, monkeypatch):
    data = make_arrays()
    rng = np.random.default_rng(0)
    for key in ("observations", "next_observations"):
        data[key] = rng.integers(0, 256, (len(data["actions"]), 36, 36, 3), dtype=np.uint8)
    shifted = []
    monkeypatch.setattr(frames, "shift", lambda images, pad: shifted.append(pad) or images)
    kwargs = {"horizon": 4, "replay_buffer_class": FrameReplayBuffer, "replay_buffer_kwargs": {"random_shift": 2}}
    model = cls("CnnPolicy", VectorEnv(IMAGE, spaces.Box(-1, 1, (1,))), **{**SMALL, "batch_size": 4}, **kwargs)
    model.load_dataset(data, heldout_fraction=0.2)
    model.data.heldout_loss()
    assert not shifted
    model.data.sample(1, 4)
    assert shifted


def test_a_state_that_is_none_is_told():
    with pytest.raises(TypeError, match=r"state must be what the last predict.. returned, or None, got a tuple"):
        trained(ConsistencyBC, horizon=2).predict(OBS[:1, 0], state=(OBS, OBS))


def test_every_observation_of_a_window_is_encoded_once():
    rows = []

    class Counting(FlattenExtractor):
        def forward(self, observations):
            rows.append(len(observations))
            return super().forward(observations)

    kwargs = {**SMALL["policy_kwargs"], "features_extractor_class": Counting}
    model = make(ConsistencyBC, horizon=4, history=3, policy_kwargs=kwargs)
    model.pretrain(1)
    assert rows == [3 * 32]


def test_a_window_has_one_goal_in_hindsight():
    """Goals are the step numbers that an episode reaches; the reward of a step is 1 where it reaches the goal."""
    box = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})

    class Counter(VectorEnv):
        def reset(self, *, seed=None, options=None):
            self.t = 0
            return self.seen(), {}

        def seen(self):
            t = np.array([self.t], np.float32)
            return {"observation": t, "achieved_goal": t, "desired_goal": np.array([-1], np.float32)}

        def step(self, action):
            self.t += 1
            return self.seen(), 0.0, False, self.t >= self.length, {}

        def compute_reward(self, achieved, desired, infos):
            return (achieved == desired).all(axis=-1).astype(np.float32)

    model = online(
        CPQL, Counter(space, length=8), "MultiInputPolicy", horizon=3, history=2, gamma=0.5,
        replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"n_sampled_goal": 3}, **FEW,
    ).learn(20)  # fmt: skip
    assert model.n_updates > 0
    batch = model.data.sample(1, 4000)[0]
    t, goal = batch.observations["observation"], batch.observations["desired_goal"]
    assert t.max() == 7 and set(t[:, 1].flatten().tolist()) == set(range(8))  # of finished episodes
    assert (goal[:, 0] == goal[:, 1]).all() and (goal[:, 0] == batch.next_observations["desired_goal"][:, 1]).all()
    goal, now = goal[:, 0, 0], t[:, 1, 0]
    virtual = goal >= 0
    assert virtual.float().mean() == pytest.approx(0.75, abs=0.04) and (goal > now)[virtual].all() and goal.max() == 8
    steps = goal - now
    wanted = th.where(virtual & (steps <= 3), 0.5 ** (steps - 1), 0.0)
    np.testing.assert_allclose(batch.rewards[:, 0], wanted)


# what goes wrong


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 3}, "n_steps must be 1 with horizon=4"),
        ({"replay_buffer_class": NStepReplayBuffer}, "replay_buffer_class can't be NStepReplayBuffer"),
        ({"executed_steps": 5}, "executed_steps"),
        ({"history": 0}, "history"),
    ],
)
def test_what_does_not_go_with_chunks_is_told(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CPQL("MlpPolicy", box_env(), horizon=4, **kwargs)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("n_action_steps", "executed_steps"),
        ("chunk_size", "horizon"),
        ("horizon_length", "horizon"),
        ("n_obs_steps", "history"),
    ],
)
@pytest.mark.parametrize("cls", [CPQL, RACTD])
def test_names_of_other_projects_are_answered_with_ours(cls, theirs, ours):
    with pytest.raises(TypeError, match=f"{theirs}.*it is called {ours} here"):
        cls("MlpPolicy", box_env(), **{theirs: 8})


def test_data_without_a_full_chunk():
    model = CPQL("MlpPolicy", box_env(), horizon=21, pad=False, **SMALL)
    with pytest.raises(DatasetError, match=r"21 steps.*the longest has 20.*pad=True"):
        model.load_dataset(make_arrays())
    assert model.replay_buffer.size() == 0
    # online, one waits for it
    model = online(CPQL, horizon=8, pad=False, **FEW).learn(9)
    assert 0 < model.n_updates < 5


@pytest.mark.parametrize("pad", [True, False])
def test_heldout_loss_is_of_chunks(pad):
    model = ConsistencyBC("MlpPolicy", box_env(), horizon=4, history=2, pad=pad, **SMALL)
    model.load_dataset(make_arrays(), heldout_fraction=0.34)
    assert len(model.data.heldout["windows"]) == (40 if pad else 34)
    model.pretrain(5)
    assert model.data.heldout_loss() == model.data.heldout_loss() > 0


# online


class Clock(gym.Env):
    """Tells the steps since the start, and of which of its episodes; episodes of 5, 6, 7, ... steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self):
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        self.t, self.episode = 0, self.episode + 1
        return np.array([self.t, self.episode], np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t, self.episode], np.float32), 0.0, False, self.t >= 4 + self.episode, {}


@pytest.mark.parametrize("noise", [None, NormalActionNoise(np.zeros(1), 1e-3 * np.ones(1))])
def test_experience_is_collected_chunk_by_chunk(noise, monkeypatch):
    """The stored actions are those of plans that begin anew with every episode."""
    model = CPQL(
        "MlpPolicy", make_vec_env(Clock, 2), horizon=4, history=2, executed_steps=3, learning_starts=6, buffer_size=200,
        action_noise=noise, **SMALL, **FEW,
    )  # fmt: skip
    seen, plans, make_plans = [], [], model.policy.make_plans

    def noting(history, deterministic):
        seen.append(history.numpy().copy())
        plans.append(make_plans(history, deterministic))
        return plans[-1]

    monkeypatch.setattr(model.policy, "make_plans", noting)
    model.learn(60)
    histories, made = np.concatenate(seen), th.cat(plans)
    assert (histories[:, 0, 1] == histories[:, 1, 1]).all()  # never of two episodes
    np.testing.assert_array_equal(histories[:, 0, 0], np.maximum(histories[:, 1, 0] - 1, 0))
    buffer, warm_up = model.replay_buffer, 3
    for env in range(2):
        left, rows = 0, iter(range(buffer.pos))
        for row in rows:
            t = buffer.observations[row, env, 0]
            left = 0 if t == 0 or row == warm_up else left
            if row < warm_up:
                continue
            if left == 0:
                same = (histories[:, 1] == buffer.observations[row, env]).all(axis=1)
                candidates, left = made[np.flatnonzero(same)], 3
            np.testing.assert_allclose(
                np.abs(candidates[:, 3 - left, 0].numpy() - buffer.actions[row, env, 0]).min(),
                0,
                atol=1e-6 if noise is None else 0.01,
            )
            left -= 1


# what chunks are for


def test_chunks_and_histories_imitate_demonstrations_that_pause(monkeypatch, capsys):
    """
    At the pause one of 5 actions moves on. Cloned step by step, an episode pauses for a geometric time: as long as the
    demonstrations, 4 steps, with probability p (1 - p)^4, p = 1 / 5; acting deterministically it never ends.
    """
    monkeypatch.setattr("sys.argv", ["06_pauses.py", "--episodes", "50"])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "06_pauses.py"))
    out = capsys.readouterr().out
    assert "8% of the pauses" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "steps |" in line]
    found = {name: (float(share.rstrip("%")), alone) for name, share, _, alone in rows}
    for name in ("step by step", "chunks of 7, a new one at every step"):
        assert found[name][0] < 25 and found[name][1] != "4 steps"
    for name in ("chunks of 7", "a history of 6"):
        assert found[name][0] >= 80 and found[name][1] == "4 steps"
