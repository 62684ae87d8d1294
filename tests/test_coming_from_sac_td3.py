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


def test_the_block_of_coming_from_sac_td3_runs(tmp_path, monkeypatch, capsys):
    import re
    from pathlib import Path

    pytest.importorskip("gymnasium_robotics")
    page = (Path(__file__).parents[1] / "docs" / "coming_from_sac_td3.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    # past the random steps
    shorter = {
        "learning_starts=1000": "learning_starts=310",
        "100_000": "315",
        "10_000": "105",
        "n_eval_episodes=10": "n_eval_episodes=1",
    }
    for long, short in shorter.items():
        assert block.count(long) == 1, long
        block = block.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert "(-" in capsys.readouterr().out
