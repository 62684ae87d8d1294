"""What a run of ours saves and shares beside its model: files that execute nothing, in the place of rl-zoo3's pickles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.utils import get_latest_run_id
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, unwrap_vec_normalize

from sb3_consistency.data.recognise import BUFFERS
from sb3_consistency.data.safe_file import warn_of_pickle
from sb3_consistency.data.safe_state import load_vec_normalize, save_vec_normalize
from sb3_consistency.zoo.register import is_ours
from sb3_consistency.zoo.workarounds import around

#: in a run's folder
BUFFER, STATISTICS = BUFFERS[0], "vecnormalize.safetensors"
#: in a repository of the hub
HUB_STATISTICS = "vec_normalize.safetensors"
#: a section of the model's card
SAFE = """
## Without running code
The zip file is a pickle, and `enjoy` reads YAML that can name any code. These files are numbers and text:
```python
from huggingface_hub import hf_hub_download
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import {imports}

env = make_vec_env("{env_id}"{env_kwargs})
{statistics}model = load_safe(hf_hub_download("{repo_id}", "{file}"), env=env)
```
"""
SAFE_STATISTICS = """env = load_vec_normalize(hf_hub_download("{repo_id}", "{file}"), env)
env.training = env.norm_reward = False
"""


class SaveStatisticsCallback(SaveVecNormalizeCallback):
    """Saves the statistics of VecNormalize every ``save_freq`` calls."""

    def _on_step(self) -> bool:
        env = self.model.get_vec_normalize_env()
        if self.n_calls % self.save_freq == 0 and env is not None:
            save_vec_normalize(env, Path(self.save_path, STATISTICS))
        return True


def save_buffer(model: Any, folder: str | Path) -> None:
    """
    Save a replay buffer; as a pickle if it holds what a safe file can't.

    :param model: trained model
    :param folder: folder of the run
    """
    path = Path(folder, BUFFER)
    try:
        model.save_replay_buffer(path)
    except ValueError as error:
        print(f"{error} It is saved as a pickle.")
        model.save_replay_buffer(path.with_suffix(".pkl"))


def find_statistics(folder: str | Path) -> Path | None:
    """
    :param folder: where a run of one of our algorithms keeps its statistics of VecNormalize
    :return: their file; None if there is none, or only a pickle, which rl-zoo3 will load and which is warned of
    """
    path = Path(folder, STATISTICS)
    if path.is_file():
        print(f"Loading the statistics of VecNormalize: {path}")
        return path
    if path.with_suffix(".pkl").is_file():
        warn_of_pickle(str(path.with_suffix(".pkl")), "save_vec_normalize(env, {})")
    return None


def normalised(path: Path, env: VecEnv, eval_env: bool) -> VecEnv:
    """
    :param path: file of statistics
    :param env: the environment
    :param eval_env: whether it is for evaluation: then the statistics stay as they are, and rewards are not normalised
    :return: the environment, wrapped in VecNormalize
    """
    wrapped = load_vec_normalize(path, env)
    if eval_env:
        wrapped.training = wrapped.norm_reward = False
    return wrapped


def read_our_statistics(module: Any) -> None:
    """
    Have test environments made with the statistics that our runs save.

    :param module: a module of rl-zoo3 that makes such environments
    """

    @around(module, "create_test_env")
    def create_test_env(
        original: Callable[..., VecEnv],
        env_id: str,
        n_envs: int = 1,
        stats_path: str | None = None,
        *args: Any,
        hyperparams: Any = None,
        **kwargs: Any,
    ) -> VecEnv:
        given, statistics = dict(hyperparams or {}), None
        # <folder>/<algorithm>[/<run>]/<environment>
        if stats_path is not None and any(map(is_ours, Path(stats_path).parts[-3:-1])):
            statistics = find_statistics(stats_path) if given.get("normalize") else None
        n_stack = 0
        if statistics is not None:
            n_stack, given["normalize"] = given.pop("frame_stack", 0), False
        env = original(env_id, n_envs, stats_path, *args, hyperparams=given, **kwargs)
        if statistics is not None:
            env = normalised(statistics, env, eval_env=True)
        return VecFrameStack(env, n_stack) if n_stack > 0 else env


def fetch_safe_files(module: Any) -> None:
    """
    Have the safe files of a repository fetched, too.

    :param module: the module ``rl_zoo3.load_from_hub``
    """

    @around(module, "download_from_hub")
    def download_from_hub(
        original: Callable[..., None],
        algo: str,
        env_name: Any,
        exp_id: int,
        folder: str,
        organization: str,
        repo_name: str | None,
        force: bool,
    ) -> None:
        original(algo, env_name, exp_id, folder, organization, repo_name, force)
        if not is_ours(algo):
            return
        run = Path(folder, algo)
        exp_id = get_latest_run_id(str(run), env_name) if exp_id == 0 else exp_id
        run = run / f"{env_name}_{exp_id}" if exp_id > 0 else run
        name = module.ModelName(algo, env_name)
        repo_id = module.ModelRepoId(organization, repo_name or name)
        for remote, local in (
            (f"{name}.safetensors", run / f"{env_name}.safetensors"),
            (HUB_STATISTICS, run / env_name / STATISTICS),
        ):
            try:
                module.shutil.copy(module.load_from_hub(repo_id, remote), local)
            except module.HTTPError:
                continue
            print(f"Saving {remote} to {local}")
            if local.name == STATISTICS:
                local.with_suffix(".pkl").unlink(missing_ok=True)


def push_safe_files(module: Any) -> None:
    """
    Have our models and their statistics uploaded as files that execute nothing; the zip file of the model stays beside them.

    :param module: the module ``rl_zoo3.push_to_hub``
    """

    @around(module, "save_model_card")
    def save_model_card(original: Callable[..., None], repository: Path, card: str, metadata: dict[str, Any]) -> None:
        # the script's own variables, as its last step before the upload finds them
        script = vars(module)
        if is_ours(script.get("algo", "")):
            card += _write_safe_files(Path(repository), script)
        original(repository, card, metadata)


def _write_safe_files(repository: Path, script: dict[str, Any]) -> str:
    """Write them into the copy of the repository; returns the section of the card that says how to use them."""
    statistics = unwrap_vec_normalize(script["eval_env"])
    if statistics is not None:
        save_vec_normalize(statistics, repository / HUB_STATISTICS)
        (repository / "vec_normalize.pkl").unlink(missing_ok=True)
    file = f"{script['model_name']}.safetensors"
    try:
        script["model"].save_safe(repository / file)
    except ValueError as error:
        print(f"The hub gets no file of the model that executes nothing: {error}")
        return ""
    repo_id, env_kwargs = script["repo_id"], {k: v for k, v in script["env_kwargs"].items() if k != "render_mode"}
    return SAFE.format(
        imports="load_safe" if statistics is None else "load_safe, load_vec_normalize",
        statistics="" if statistics is None else SAFE_STATISTICS.format(repo_id=repo_id, file=HUB_STATISTICS),
        env_id=script["env_name"].gym_id,
        env_kwargs=f", env_kwargs={env_kwargs}" if env_kwargs else "",
        repo_id=repo_id,
        file=file,
    )
