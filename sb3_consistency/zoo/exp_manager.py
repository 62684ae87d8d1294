"""rl-zoo3's experiment manager with our hyperparameter files, offline phase, schedules and merged policy_kwargs."""

import argparse
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import optuna
import rl_zoo3.exp_manager
import yaml
from huggingface_sb3 import EnvironmentName
from optuna.trial import TrialState
from rl_zoo3.exp_manager import ALGOS, ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER
from rl_zoo3.utils import SimpleLinearSchedule, get_callback_list
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_consistency.data.checks import as_count
from sb3_consistency.data.safe_state import save_vec_normalize
from sb3_consistency.envs.spaces import fitting_policy
from sb3_consistency.resume.callback import load_checkpoint
from sb3_consistency.resume.folder import MANIFEST, verify
from sb3_consistency.training.arguments import gradient_steps_online
from sb3_consistency.zoo.datasets import FLATTEN, dataset_key, needs_flattening, split_dataset
from sb3_consistency.zoo.linear_schedules import LinearStepSchedule, parse_linear
from sb3_consistency.zoo.register import PRETRAIN_FOLDER, algorithm_names, default_config, is_ours
from sb3_consistency.zoo.safe_files import BUFFER, STATISTICS, SaveStatisticsCallback, find_statistics, normalised, save_buffer
from sb3_consistency.zoo.search_spaces import OFFLINE
from sb3_consistency.zoo.studies import Repetition, open_storage, patiently, report_seeds
from sb3_consistency.zoo.workarounds import require_pandas

# schedules of the progress remaining, and functions of the gradient step, that may be written "lin_<number>"
PROGRESS_SCHEDULES = ("actor_learning_rate", "offline_fraction")
STEP_SCHEDULES = ("eta", "alpha")


# what update() merges
NESTED = ("policy_kwargs", "replay_buffer_kwargs")


class Hyperparams(dict[str, Any]):
    """Hyperparameters of which ``update`` merges the :data:`NESTED` ones: what is not tuned stays."""

    def copy(self) -> "Hyperparams":
        return Hyperparams(self)

    def update(self, other: Any = (), /, **kwargs: Any) -> None:
        changes = dict(other, **kwargs)
        for key in NESTED:
            if key in changes and self.get(key):
                changes[key] = {**_evaluated(self[key]), **_evaluated(changes[key])}
        super().update(changes)


def _evaluated(kwargs: Any) -> Any:
    """``policy_kwargs`` of a YAML file, which the zoo evaluates where its own module's names are known."""
    return eval(kwargs, vars(rl_zoo3.exp_manager)) if isinstance(kwargs, str) else kwargs


class GenerativeExperimentManager(ExperimentManager):
    """
    Serves all algorithms of the zoo; for those of this package it adds the offline phase.

    :param args: parsed command line, with ``dataset``, ``pretrain_steps`` and ``hyperparams_id`` if our parser made it
    :param algo: key of the algorithm
    :param env_id: id of the environment
    :param rest: see rl-zoo3's class
    :param config: hyperparameter file; None for the default one
    :param kwargs: see rl-zoo3's class
    :raises ValueError: if a dataset is given for an algorithm that can't learn from it, or a file is missing
    """

    def __init__(
        self, args: argparse.Namespace, algo: str, env_id: str, *rest: Any, config: str | None = None, **kwargs: Any
    ) -> None:
        self.dataset = getattr(args, "dataset", None)
        self.pretrain_steps: int | None = getattr(args, "pretrain_steps", None)
        self.hyperparams_id: str | None = getattr(args, "hyperparams_id", None)
        self.seeds_per_trial: int = getattr(args, "seeds_per_trial", 1)
        self.heartbeat: int = getattr(args, "heartbeat", 60)
        if is_ours(algo):
            config = config or str(default_config(algo, offline=self.dataset is not None))
        elif self.dataset is not None or self.pretrain_steps is not None:
            raise ValueError(f"dataset: {algo!r} does not learn from datasets; use one of {list(algorithm_names())}.")
        super().__init__(args, algo, env_id, *rest, config=config, **kwargs)  # type: ignore[misc]
        ours = {"dataset": self.dataset, "pretrain_steps": self.pretrain_steps}
        given = {key: value for key, value in ours.items() if value is not None}
        if given:
            self.custom_hyperparams = {**(self.custom_hyperparams or {}), **given}

    @property
    def _is_ours(self) -> bool:
        return is_ours(self.algo)

    @property
    def _offline_only(self) -> bool:
        return bool(getattr(ALGOS[self.algo], "offline_only", False))

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # rl-zoo3 takes trial 0 for no trial, and lets its policy_kwargs replace those of the file
        trial_id, self.trial_id = self.trial_id, None
        # it looks the section up under the environment's id
        env_name, self.env_name = self.env_name, EnvironmentName(self._section())
        try:
            found, _ = super().read_hyperparameters()
        finally:
            self.env_name, self.trial_id = env_name, trial_id
        hyperparams = Hyperparams(found)
        if self.storage and self.study_name and trial_id is not None:
            found_by_tuning = self.load_trial(self.storage, self.study_name, trial_id)
            print(f"Hyperparameters of trial {trial_id} of {self.study_name}: {found_by_tuning}")
            hyperparams.update(found_by_tuning)
            # the command line has the last word
            hyperparams.update(self.custom_hyperparams or {})
        if "dataset" in hyperparams:
            hyperparams["dataset"] = split_dataset(hyperparams["dataset"])
            env_kwargs = {**hyperparams.get("env_kwargs", {}), **self.env_kwargs}
            if "env_wrapper" not in hyperparams and needs_flattening(env_name.gym_id, env_kwargs):
                hyperparams["env_wrapper"] = FLATTEN
        return hyperparams, OrderedDict(sorted(hyperparams.items()))

    def _section(self) -> str:
        """The key of the hyperparameter file to use; rl-zoo3 takes "default" if there is none of this name."""
        names = _section_names(self.config)
        if self.hyperparams_id is not None:
            if names is not None and self.hyperparams_id not in names:
                raise ValueError(
                    f"hyperparams_id: {self.hyperparams_id!r} is not in {self.config}, which has {sorted(names)}."
                )
            return self.hyperparams_id
        if self.dataset is not None:
            wanted = dataset_key(self.dataset)
            for name in names or ():
                if dataset_key(name) == wanted:
                    return name
        return str(self.env_name.gym_id)

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        if self._offline_only and "pretrain_steps" in hyperparams:
            # for these algorithms learn() is the offline phase
            hyperparams["n_timesteps"] = hyperparams.pop("pretrain_steps")
        elif "pretrain_steps" in hyperparams:
            # "1e5" is a float, as rl-zoo3 takes n_timesteps
            hyperparams["pretrain_steps"] = as_count("pretrain_steps", hyperparams["pretrain_steps"])
        hyperparams.setdefault("n_timesteps", 0)
        unset = self.n_evaluations is None
        processed = super()._preprocess_hyperparams(hyperparams)
        pretrain_steps = hyperparams.get("pretrain_steps", 0)
        if unset and self.optimize_hyperparameters and pretrain_steps:
            self.n_evaluations = max(1, (pretrain_steps + self.n_timesteps) // 100_000)
        return processed

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        for key in (*PROGRESS_SCHEDULES, *STEP_SCHEDULES):
            if isinstance(hyperparams.get(key), str):
                value, falls = parse_linear(key, hyperparams[key])
                schedule: Any = value
                if falls and key in PROGRESS_SCHEDULES:
                    schedule = SimpleLinearSchedule(value)
                elif falls:
                    schedule = LinearStepSchedule(value, max(self._gradient_steps(hyperparams), 1))
                hyperparams[key] = schedule
        return super()._preprocess_schedules(hyperparams)

    def _gradient_steps(self, hyperparams: dict[str, Any]) -> int:
        """How many gradient steps the run takes, to schedule over them."""
        n_timesteps = self.n_timesteps if self.n_timesteps > 0 else int(hyperparams["n_timesteps"])
        if self._offline_only:
            return n_timesteps
        train_freq, gradient_steps = hyperparams.get("train_freq", 1), hyperparams.get("gradient_steps", 1)
        number, unit = train_freq if isinstance(train_freq, (list, tuple)) else (train_freq, "step")
        pretrain_steps = hyperparams.get("pretrain_steps", 0)
        trained = max(0, n_timesteps - (0 if pretrain_steps else hyperparams.get("learning_starts", 100)))
        return int(pretrain_steps + gradient_steps_online(trained, number, unit, gradient_steps, hyperparams.get("n_envs", 1)))

    def _preprocess_action_noise(
        self, hyperparams: dict[str, Any], saved_hyperparams: dict[str, Any], env: VecEnv
    ) -> dict[str, Any]:
        if "policy" not in hyperparams:
            hyperparams["policy"] = saved_hyperparams["policy"] = fitting_policy(env.observation_space)
        return Hyperparams(super()._preprocess_action_noise(hyperparams, saved_hyperparams, env))

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        folder = Path(self.trained_agent).parent
        if self._is_ours:
            # not the small one for acting
            hyperparams.setdefault("buffer_size", None)
            if (folder / MANIFEST).is_file():
                # of an interrupted run, which goes on with its own hyperparameters
                options = {"tensorboard_log": self.tensorboard_log, "verbose": self.verbose, "buffer_size": None}
                algorithm: Any = ALGOS[self.algo]
                return load_checkpoint(algorithm, verify(folder), env, self.device, **options)
        # the file's number of steps in the place of the hyperparameters': a pretrained model goes on online
        steps = hyperparams.pop("pretrain_steps", 0) if self.pretrain_steps is None else 0
        model = super()._load_pretrained_agent(hyperparams, env)
        if self._is_ours and (folder / BUFFER).is_file():
            print("Loading replay buffer")
            model.load_replay_buffer(folder / BUFFER, self.truncate_last_trajectory)  # type: ignore[attr-defined]
        if steps and self._is_ours and model.run.pretrain_start is None:  # type: ignore[attr-defined]
            model.pretrain_steps = steps  # type: ignore[attr-defined]
        self._move_schedules(model)
        return model

    def _move_schedules(self, model: Any) -> None:
        """Schedules of the gradient step begin where the loaded model stands, and end with this run."""
        schedules = {key: vars(model).get(key) for key in STEP_SCHEDULES}
        moving = {key: schedule for key, schedule in schedules.items() if isinstance(schedule, LinearStepSchedule)}
        if not moving:
            return
        run = {
            "n_timesteps": self.n_timesteps,
            "train_freq": (model.train_freq.frequency, model.train_freq.unit.value),
            "gradient_steps": model.gradient_steps,
            "n_envs": model.n_envs,
            "learning_starts": model.learning_starts,
            "pretrain_steps": max(0, model._pretraining_left()),
        }
        steps = max(self._gradient_steps(run), 1)
        for key, schedule in moving.items():
            setattr(model, key, replace(schedule, start=model._n_updates, steps=steps))

    def learn(self, model: BaseAlgorithm) -> None:
        """
        Train; an offline phase that an online phase follows writes its evaluations and checkpoints to a folder of its own.

        :param model: an initialised model
        """
        left = not getattr(model, "is_pretrained", True) or getattr(model, "interrupted_phase", None) == "offline"
        pretrain_first = self.n_timesteps > 0 and not self._offline_only and left
        try:
            if pretrain_first and not self._finish_pretraining(model):
                model.env.close()  # type: ignore[union-attr]
                return
            super().learn(_learner(model))
        except BaseException:
            self._forget_if_empty()
            raise

    def _finish_pretraining(self, model: Any) -> bool:
        """Take the offline phase; False if a callback or the user stopped it."""
        callbacks = self._pretrain_callbacks()
        try:
            _learner(model).learn(0, callback=callbacks)
        except KeyboardInterrupt:
            for callback in callbacks[:1]:  # the progress bar
                callback.on_training_end()
            return False
        return bool(model.is_pretrained)

    def _pretrain_callbacks(self) -> list[Any]:
        names = ("callbacks", "save_path", "params_path", "eval_freq", "save_freq", "n_envs")
        saved = {name: getattr(self, name) for name in names}
        self.callbacks = get_callback_list({"callback": self.specified_callbacks})
        self.save_path = os.path.join(self.save_path, PRETRAIN_FOLDER)
        # beside the models of this phase, where rl-zoo3 looks for the statistics of a model that it goes on with
        self.params_path = os.path.join(self.save_path, self.env_name)
        # these are per environment by now; a gradient step is one step
        self.eval_freq, self.save_freq, self.n_envs = self.eval_freq * self.n_envs, self.save_freq * self.n_envs, 1
        try:
            self.create_callbacks()
            if self.save_freq > 0:
                self.callbacks.append(SaveStatisticsCallback(self.save_freq, self.params_path))
            return self.callbacks
        finally:
            for name, value in saved.items():
                setattr(self, name, value)

    def create_callbacks(self) -> None:
        """Make the callbacks; see rl-zoo3's method."""
        module: Any = rl_zoo3.exp_manager
        original = module.SaveVecNormalizeCallback
        if self._is_ours:
            module.SaveVecNormalizeCallback = SaveStatisticsCallback
        try:
            super().create_callbacks()
        finally:
            module.SaveVecNormalizeCallback = original

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        if self._is_ours and self.continue_training:
            statistics = find_statistics(Path(self.trained_agent).parent / self.env_name)
            if statistics is not None:
                return normalised(statistics, env, eval_env)
        return super()._maybe_normalize(env, eval_env)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model, the statistics of VecNormalize, and the replay buffer if it is asked for.

        :param model: trained model
        """
        if not self._is_ours:
            return super().save_trained_model(model)
        print(f"Saving to {self.save_path}")
        model.save(os.path.join(self.save_path, self.env_name))
        if self.save_replay_buffer:
            print("Saving replay buffer")
            save_buffer(model, self.save_path)
        statistics = model.get_vec_normalize_env()
        if statistics is not None:
            save_vec_normalize(statistics, Path(self.params_path, STATISTICS))

    def objective(self, trial: optuna.Trial) -> float:
        """
        Train and evaluate with sampled hyperparameters; see rl-zoo3's method.

        :param trial: trial of the study
        :return: mean return of the last evaluation, which the study maximises
        """
        if self._is_ours:
            # rl-zoo3 does not tell the search space
            trial.set_user_attr(OFFLINE, "dataset" in self._hyperparams)
        try:
            if self.seeds_per_trial == 1:
                return super().objective(trial)
            return report_seeds(trial, [self._objective_of_seed(trial, seed) for seed in range(self.seeds_per_trial)])
        except ValueError as error:
            # where another trial got further, what was sampled is to blame, and not what was given
            further = (TrialState.COMPLETE, TrialState.PRUNED)
            if not trial.study.get_trials(deepcopy=False, states=further):
                raise
            print(f"Trial {trial.number} is pruned: {error}")
            raise optuna.exceptions.TrialPruned() from error

    def _objective_of_seed(self, trial: optuna.Trial, seed: int) -> float:
        """All trials have the same seeds: what they differ in is then less due to chance."""
        before, self.seed = self.seed, seed
        set_random_seed(seed)
        try:
            return super().objective(trial if seed == 0 else cast(optuna.Trial, Repetition(trial, seed)))
        finally:
            self.seed = before

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> dict[str, Any]:
        """
        Hyperparameters that tuning found; see rl-zoo3's method.

        :param storage: as :func:`~sb3_consistency.zoo.studies.open_storage` takes it
        :param study_name: name of the study
        :param trial_id: number of the trial; None for the best one
        :param convert: whether to make constructor arguments of the sampled values
        :return: the hyperparameters
        :raises ValueError: if there is no such study, or it has no such trial, or not its hyperparameters
        """
        if storage.endswith(".log") and not Path(storage).is_file():
            raise ValueError(f"--storage: there is no file {storage}; name the one that optimize wrote.")
        try:
            study = optuna.load_study(storage=open_storage(storage), study_name=study_name)
        except KeyError as error:
            raise ValueError(f"--study-name: there is no study {study_name!r} in --storage.") from error
        n_trials = len(study.trials)
        if trial_id is not None and not 0 <= trial_id < n_trials:
            raise ValueError(f"--trial-id: {study_name} has {n_trials} trials, numbered from 0, got {trial_id}.")
        trial = study.best_trial if trial_id is None else study.trials[trial_id]
        try:
            return dict(HYPERPARAMS_CONVERTER[self.algo](trial.params)) if convert else trial.params
        except KeyError as error:
            told = f"trial {trial.number} of {study_name}, {trial.state.name}, has no {error}"
            raise ValueError(f"--trial-id: {told}; choose a finished one.") from error

    def hyperparameters_optimization(self) -> None:
        require_pandas()
        module: Any = rl_zoo3.exp_manager
        original, create_study = module.TrialEvalCallback, optuna.create_study
        pretrain_steps = self._hyperparams.get("pretrain_steps", 0)
        if pretrain_steps:
            # rl-zoo3 spreads the evaluations over the online steps, its callback counts the offline ones, too
            eval_freq = max((pretrain_steps + self.n_timesteps // self.n_envs) // self.n_evaluations, 1)

            def spread(*args: Any, **kwargs: Any) -> Any:
                return original(*args, **{**kwargs, "eval_freq": eval_freq})

            module.TrialEvalCallback = spread
        storage, url = None, self.storage
        if url is not None:
            if url.endswith(".log"):
                Path(url).parent.mkdir(parents=True, exist_ok=True)
            storage = open_storage(url, self.heartbeat)
        optuna.create_study = patiently(create_study, storage)
        try:
            super().hyperparameters_optimization()
        finally:
            module.TrialEvalCallback, optuna.create_study = original, create_study
            self._forget_if_empty()

    def setup_experiment(self) -> Any:
        """
        Build the model; see rl-zoo3's method.

        :return: the model and its hyperparameters; None when tuning
        :raises ValueError: if a hyperparameter is unknown, or has a wrong type or value
        """
        try:
            return super().setup_experiment()
        except BaseException as error:
            self._forget_if_empty()
            if isinstance(error, TypeError):
                # of what was given, and told as such; a TypeError in training needs its traceback
                raise ValueError(str(error)) from error
            raise

    def _forget_if_empty(self) -> None:
        """The folder of a run that failed before it had anything would be the newest, and ``enjoy`` would look there."""
        folder = Path(self.save_path)
        if not folder.is_dir() or any(path.suffix in (".zip", ".npz", ".pkl", ".safetensors") for path in folder.rglob("*")):
            return
        # a comment, the column names, then episodes
        if any(len(path.read_text().splitlines()) > 2 for path in folder.rglob("*monitor.csv")):
            return
        shutil.rmtree(folder, ignore_errors=True)


class _Continued:
    """Stands in for a model from a checkpoint: its ``learn`` continues the call that was interrupted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.env = model.env

    def learn(self, total_timesteps: int, callback: Any = None, **kwargs: Any) -> None:
        print(f"Continuing the {self.model.interrupted_phase} phase of {self.model.last_checkpoint}")
        self.model.resume(callback)


def _learner(model: Any) -> Any:
    return model if getattr(model, "interrupted_phase", None) is None else _Continued(model)


def _section_names(config: str) -> Iterable[str] | None:
    """Keys of a hyperparameter file; None for Python files and packages, which only rl-zoo3 reads."""
    if not config.endswith((".yml", ".yaml")):
        return None
    return [str(key) for key in yaml.safe_load(Path(config).read_text())]
