"""Spaces: what observations and actions may be, images in every order, spaces taken from arrays or an environment."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from sb3_consistency import CPQL
from tests.conftest import SMALL, VectorEnv, actor_critics, box_env, every, make_arrays, online


@every
@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-np.inf, 1, (2,)), spaces.MultiBinary(2)])
def test_unsupported_action_spaces(cls, space):
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="env:"):
            cls("MlpPolicy", VectorEnv(action_space=space))


@pytest.mark.parametrize(("high", "dtype"), [(0, np.float32), (np.nextafter(0, 1), np.float64)])
def test_flat_action_dimensions_are_refused(high, dtype):
    space = spaces.Box(np.zeros(2, dtype), np.array([1, high], dtype), dtype=dtype)
    with pytest.raises(ValueError, match="low < high"):
        CPQL("MlpPolicy", VectorEnv(action_space=space))


@every
def test_image_and_dict_observations(cls):
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    mixed = spaces.Dict({"image": image, "vector": spaces.Box(-1, 1, (4,)), "kind": spaces.Discrete(3)})
    for policy, space in (("CnnPolicy", image), ("MultiInputPolicy", mixed)):
        env = VectorEnv(observation_space=space)
        collector = CPQL(policy, env, buffer_size=60, learning_starts=100, **SMALL).learn(30)
        model = cls(policy, env, buffer_size=60, **SMALL)
        model.load_dataset(collector.replay_buffer)
        model.pretrain(2)
        obs = space.sample()
        assert model.predict(obs, deterministic=True)[0].shape == (2,)


def test_only_images_are_taken_for_images():
    data = make_arrays(n_episodes=2, length=10, action_dim=2)
    for key in ("observations", "next_observations"):
        data[key] = np.zeros((20, 2, 3, 4), np.float32)
    env = VectorEnv(observation_space=spaces.Box(-1, 1, (2, 3, 4), np.float32))
    assert CPQL.from_dataset(data, env=env, **SMALL).pretrain(1).predict(np.zeros((2, 3, 4)))[0].shape == (2,)


class ImageEnv(VectorEnv):
    """Images whose first channel alone is white, in any order of the axes."""

    def __init__(self, channels_last=True):
        shape = (36, 36, 3) if channels_last else (3, 36, 36)
        super().__init__(spaces.Box(0, 255, shape, np.uint8))
        self.channels_last = channels_last

    def image(self):
        image = np.zeros((36, 36, 3), np.uint8)
        image[..., 0] = 255
        return image if self.channels_last else image.transpose(2, 0, 1)

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self.image(), {}

    def step(self, action):
        return self.image(), *super().step(action)[1:]


@actor_critics
@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_come_first(cls, channels_last):
    model = online(cls, ImageEnv(channels_last), "CnnPolicy", buffer_size=30).learn(12)
    assert model.observation_space.shape == (3, 36, 36)
    assert isinstance(model.get_env(), VecTransposeImage) == channels_last
    stored = model.replay_buffer.observations[:12, 0]
    assert stored.dtype == np.uint8 and (stored[:, 0] == 255).all() and (stored[:, 1:] == 0).all()
    seen = []
    acting = model.policy.acting(deterministic=True)
    acting.features_extractor.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    action, _ = model.predict(ImageEnv(channels_last).image(), deterministic=True)
    assert action.shape == (2,) and seen[0][0, 0].unique().tolist() == [1.0]  # divided by 255


@every
def test_frame_stack(cls):
    env = VecFrameStack(make_vec_env(ImageEnv, n_envs=1), n_stack=2)
    collector = online(CPQL, env, "CnnPolicy", buffer_size=30).learn(12)
    model = cls("CnnPolicy", env, buffer_size=30, **SMALL)
    model.load_dataset(collector.replay_buffer)
    model.pretrain(4)
    assert model.observation_space.shape == (6, 36, 36)
    assert model.predict(env.reset(), deterministic=True)[0].shape == (1, 2)


def test_images_that_are_normalised_already():
    space = spaces.Box(0, 1, (3, 36, 36), np.float32)
    model = online(CPQL, VectorEnv(space), "CnnPolicy", buffer_size=20, policy_kwargs={"normalize_images": False}).learn(8)
    assert not model.policy.normalize_images
    with pytest.raises(AssertionError, match="normalize_images"):
        online(CPQL, VectorEnv(space), "CnnPolicy", buffer_size=20)


# spaces of arrays and of environments


def from_arrays_alone(observations=None, actions=1.0, cls=CPQL, policy="MlpPolicy"):
    data = make_arrays()
    data["actions"] = actions * data["actions"]
    if observations is not None:
        data.update({key: observations(data[key]) for key in ("observations", "next_observations")})
    return cls(policy, None, dataset=data, **SMALL).pretrain(3)


DOUBLES = spaces.Box(-1000, 1000, (3,), np.float64)  # arrays don't tell these bounds, nor this precision


DICT_OF_DOUBLES = spaces.Dict({"a": DOUBLES, "b": DOUBLES})


@pytest.mark.parametrize("way", ["set_env", "load", "load_safe"])
@pytest.mark.parametrize("space", [DOUBLES, DICT_OF_DOUBLES])
def test_a_model_made_from_arrays_takes_the_spaces_of_an_environment(way, space, tmp_path):
    is_dict = isinstance(space, spaces.Dict)
    model = from_arrays_alone(
        (lambda x: {"a": x, "b": x}) if is_dict else None, policy="MultiInputPolicy" if is_dict else "MlpPolicy"
    )
    env = VectorEnv(space, spaces.Box(-1, 1, (1,), np.float64))
    observation = space.sample()
    expected = model.predict(observation, deterministic=True)[0]
    if way == "set_env":
        model.set_env(env)
    else:
        getattr(model, way.replace("load", "save"))(tmp_path / "model")
        model = getattr(type(model), way)(tmp_path / "model", env=env)
    assert model.observation_space == model.actor.observation_space == space and model.action_space == env.action_space
    np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], expected)
    model.learn(12)
    assert model.replay_buffer.observation_space == space
    model.save(tmp_path / "again")
    CPQL.load(tmp_path / "again", env=env)
    with pytest.raises(ValueError, match="spaces do not match"):  # they are stated now
        model.set_env(box_env())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (VectorEnv(spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (1,))), r"'observation_space' \(an \.npz file"),
        (VectorEnv(spaces.MultiBinary(3), spaces.Box(-1, 1, (1,))), "inferred from arrays"),
        (VectorEnv(DOUBLES, spaces.Box(-2, 2, (1,))), "another scale: make the model with env=.*'action_space'"),
        (VectorEnv(DOUBLES, spaces.Discrete(2)), "another scale"),
    ],
)
def test_spaces_that_would_change_what_was_learned_are_refused(env, message, tmp_path):
    model = from_arrays_alone(actions=0.5)
    before = model.observation_space, model.action_space
    model.save(tmp_path / "model")
    for attempt in (model.set_env, lambda env: CPQL.load(tmp_path / "model", env=env)):
        with pytest.raises(ValueError, match=message):
            attempt(env)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(lambda: VectorEnv(DOUBLES, spaces.Box(-1, 1, (1,))), n_envs=2))
    assert (model.observation_space, model.action_space) == before and model.actor.observation_space is before[0]
