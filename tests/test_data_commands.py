"""``inspect`` and ``convert``, and that every row of the page "Bring your own data" is read."""

import os
from pathlib import Path

import numpy as np
import pytest

from sb3_consistency import DatasetError, record_dataset, swing_up
from sb3_consistency.__main__ import main
from sb3_consistency.data.convert import convert_dataset
from sb3_consistency.data.formats.minari import writing_dataset
from sb3_consistency.data.opening import open_dataset
from tests import formats
from tests.conftest import VectorEnv, make_arrays
from tests.formats import assert_is


def test_inspect_and_convert(tmp_path, minari_folder, capsys):
    episodes = formats.happened()
    path = formats.d4rl(tmp_path, episodes)
    assert main(["inspect", path, "-o", str(tmp_path / "picture.png")]) == 0
    text = capsys.readouterr().out
    for line in (
        "episodes            5",
        "steps               18",
        "terminations        3",
        "normalized return",
        "dropped the last",
    ):
        assert line in text
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert main(["convert", path, "test/converted-v0"]) == 0
    assert_is(open_dataset("test/converted-v0"), episodes, formats.SHIFTED, True, True)
    assert open_dataset("test/converted-v0").reference_returns == (-20.272305, 3234.3)
    assert main(["convert", path, "test/converted-v0"]) == 1
    assert "exists" in capsys.readouterr().err


def refuse(name, replace=os.replace):
    """os.replace() that moves anything but one folder."""

    def moved(source, target):
        if Path(source).name == name:
            raise PermissionError(name)
        replace(source, target)

    return moved


def test_an_old_dataset_stays_until_the_new_one_is_complete(minari_folder, monkeypatch, capsys):
    arrays, other = make_arrays(), make_arrays(n_episodes=4)
    convert_dataset(arrays, "test/old-v0", env="Pendulum-v1")
    old = open_dataset("test/old-v0").returns
    with monkeypatch.context() as patch:
        patch.setattr("sb3_consistency.data.convert._compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_dataset(other, "test/old-v0", env="Pendulum-v1", overwrite=True)
    np.testing.assert_array_equal(open_dataset("test/old-v0").returns, old)
    # read from what it replaces
    assert main(["convert", "test/old-v0", "test/old-v0", "--env", "Pendulum-v1", "--overwrite"]) == 0
    np.testing.assert_array_equal(open_dataset("test/old-v0").returns, old)
    convert_dataset(other, "test/old-v0", env="Pendulum-v1", overwrite=True)
    replaced = open_dataset("test/old-v0")
    assert len(replaced.returns) == 4 and replaced.name == "dataset test/old-v0"
    with monkeypatch.context() as patch:
        patch.setattr("minari.create_dataset_from_buffers", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record_dataset("test/old-v0", "Pendulum-v1", swing_up(0.5, 0), 10, overwrite=True)
    np.testing.assert_array_equal(open_dataset("test/old-v0").returns, replaced.returns)
    record_dataset("test/old-v0", "Pendulum-v1", swing_up(0.5, 0), 10, overwrite=True)
    assert open_dataset("test/old-v0").lengths.tolist() == [10]
    # another process wrote one in the meantime
    with pytest.raises(DatasetError, match="exists"), writing_dataset("test/new-v0", overwrite=False) as unfinished:
        for dataset_id in (unfinished, "test/new-v0"):
            convert_dataset(arrays, dataset_id, env="Pendulum-v1")
    # it can't be moved to its place
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        with writing_dataset("test/old-v0", overwrite=True) as unfinished:
            convert_dataset(other, unfinished, env="Pendulum-v1")
            patch.setattr("os.replace", refuse(unfinished.partition("/")[2]))
    assert open_dataset("test/old-v0").lengths.tolist() == [10]
    assert sorted(path.name for path in (minari_folder / "test").iterdir() if path.is_dir()) == ["new-v0", "old-v0"]
    # a folder of others
    convert_dataset(arrays, "test/old-v1/inside-v0", env="Pendulum-v1")
    with pytest.raises(DatasetError, match="no dataset but other things"):
        convert_dataset(arrays, "test/old-v1", env="Pendulum-v1", overwrite=True)
    assert len(open_dataset("test/old-v1/inside-v0").lengths) == 6


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_becomes_a_minari_dataset(name, tmp_path, minari_folder):
    write, *how = formats.FORMATS[name]
    episodes = formats.happened()
    source = open_dataset(write(tmp_path, episodes))
    convert_dataset(source, "test/any-v0")
    assert_is(open_dataset("test/any-v0"), episodes, *how)


def test_what_is_suspicious_is_said(tmp_path, capsys):
    arrays = make_arrays()
    arrays["observations"][:, 1] = arrays["next_observations"][:, 1] = 5
    arrays["rewards"][7] = np.nan
    arrays["actions"][:60] = 1
    arrays["terminations"][:] = False
    np.savez(tmp_path / "odd.npz", **arrays)
    assert main(["inspect", str(tmp_path / "odd.npz")]) == 0
    text = capsys.readouterr().out
    for line in ("entries [1] never vary", "rewards: 1 entries are NaN", "no episode terminates", "actions at a bound  50"):
        assert line in text


def test_another_environment_is_refused(minari_folder):
    arrays = make_arrays(action_dim=1)
    arrays["actions"] *= 3
    convert_dataset(arrays, "test/pendulum-v0", env="Pendulum-v1")
    for env, message in (
        ("MountainCarContinuous-v0", "observations are in .* the environment's in .*is it another environment"),
        (VectorEnv(), r"actions have shape \(1,\), the environment's \(2,\)"),
    ):
        with pytest.raises(DatasetError, match=message):
            convert_dataset(arrays, "test/none-v0", env=env)
    assert not (minari_folder / "test/none-v0").exists()


def test_a_failed_conversion_leaves_nothing(minari_folder):
    arrays = make_arrays()
    arrays["actions"] *= 3
    with pytest.raises(DatasetError, match="action bounds"):
        convert_dataset(arrays, "test/none-v0")
    assert not (minari_folder / "test").exists()


# --- the page


def rows_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    table = page.split("## Formats")[1].split('"extra" is')[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")][1:]


PLACES = {
    "Minari": "minari",
    "LeRobot 3": "so100",
    "imitation, its older files": ".",
    "imitation": "rollouts",
    "run folder": "logs/sac/Pendulum-v1_1",
}
WRITERS = {
    "arrays": formats.npz,
    "replay": formats.pickled_buffer,
    "numbers": formats.safe_buffer,
    "run": formats.zoo,
    "Minari": formats.minari_folder,
    "D4RL": formats.d4rl,
    "OGBench": formats.ogbench,
    "robomimic": formats.robomimic,
    "LeRobot": formats.lerobot,
    "d3rlpy": formats.d3rlpy_2,
    "imitation": formats.imitation,
    "Diffusion": formats.zarr,
    "table": formats.csv,
}


@pytest.mark.parametrize("row", rows_of_the_page(), ids=lambda row: row[0])
def test_every_row_of_the_page_is_read(row, tmp_path, monkeypatch, capsys):
    name, dataset = row[0], row[1].strip("`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    place = tmp_path / next((place for start, place in PLACES.items() if name.startswith(start)), ".")
    place.mkdir(parents=True, exist_ok=True)
    first = "numbers" if "as numbers" in name else name.split()[0].strip(",")
    write = formats.imitation_npz if "older files" in name else WRITERS[first]
    write(place, formats.happened())
    assert main(["inspect", dataset]) == 0, capsys.readouterr().err
    assert "episodes            5" in capsys.readouterr().out
