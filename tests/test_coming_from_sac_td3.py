"""Who comes from SAC or TD3: the same defaults, what has no counterpart is told, the page's code runs."""

import pytest
from stable_baselines3 import SAC

from sb3_consistency.training.algorithm import GenerativeAlgorithm
from sb3_consistency.training.arguments import NOT_OURS
from tests.conftest import box_env, every


def test_default_arguments_follow_sac():
    import inspect

    ours = inspect.signature(GenerativeAlgorithm.__init__).parameters
    for name, parameter in inspect.signature(SAC.__init__).parameters.items():
        if name in ours and name not in ("policy", "env", "self"):
            assert ours[name].default == parameter.default, name


@every
@pytest.mark.parametrize("name", sorted(NOT_OURS))
def test_arguments_without_counterpart_say_what_to_use(cls, name):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(\) got an unexpected argument '{name}': .{{10,}}"):
        cls("MlpPolicy", box_env(), **{name: 1})
