"""The suites that train: which jobs they consist of."""

from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_consistency.benchmark.jobs import Job
from sb3_consistency.benchmark.peers import class_name, find_algorithm
from sb3_consistency.benchmark.runs import merged, plain_options

OFFLINE_ALGORITHMS = ("ConsistencyBC", "DiffusionBC", "ConsistencyAC", "CPQL", "DiffusionQL", "RACTD")
ONLINE_ALGORITHMS = ("SAC", "TD3", "TQC", "CPQL", "ConsistencyAC", "DiffusionQL")
FINE_TUNED_ALGORITHMS = ("ConsistencyAC", "CPQL", "DiffusionQL")
DATASETS = ("mujoco/hopper/medium-v0", "mujoco/halfcheetah/medium-v0", "mujoco/walker2d/medium-v0")
ENVIRONMENTS = ("Pendulum-v1", "Hopper-v5")
DENOISING_STEPS = (1, 2, 5, 10, 20)
# the option that sets the number of network passes per action, in training and acting alike
STEPS_OPTION = {
    **dict.fromkeys(("ConsistencyBC", "ConsistencyAC", "CPQL", "RACTD"), "sampling_steps"),
    **dict.fromkeys(("DiffusionBC", "DiffusionQL"), "diffusion_steps"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "offline": {"algos": OFFLINE_ALGORITHMS, "data": DATASETS, "offline_steps": 100_000, "online_steps": 0},
    "online": {"algos": ONLINE_ALGORITHMS, "data": ENVIRONMENTS, "offline_steps": 0, "online_steps": 100_000},
    "offline-to-online": {
        "algos": FINE_TUNED_ALGORITHMS,
        "data": DATASETS,
        "offline_steps": 100_000,
        "online_steps": 50_000,
    },
    "denoising": {
        "algos": ("ConsistencyBC", "DiffusionBC"),
        "data": DATASETS[:1],
        "offline_steps": 50_000,
        "online_steps": 0,
    },
}


def jobs_of(
    suite: str,
    algos: Sequence[str],
    data: Sequence[str],
    seeds: Sequence[int],
    offline_steps: int,
    online_steps: int,
    options: str = "{}",
    episodes: int = 10,
    evaluations: int = 5,
) -> list[Job]:
    """
    :param suite: name of the suite
    :param algos: algorithms, each with further constructor arguments of its own or without: "CPQL {'eta': 3.0}"
    :param data: Minari datasets, or environments of the online suite
    :param seeds: seeds
    :param offline_steps: gradient steps on the dataset
    :param online_steps: environment steps
    :param options: constructor arguments of all algorithms but other libraries', as the text of a dict
    :param episodes: episodes per evaluation
    :param evaluations: evaluations per phase
    :return: the jobs, all algorithms of one seed next to each other, so that an early stop leaves a comparison
    :raises ValueError: if ``options`` is no dict, or an algorithm is unknown or can't do what the suite asks for
    """
    taken = {"seed": "--seeds"} | (dict.fromkeys(STEPS_OPTION.values(), "the suite") if suite == "denoising" else {})
    given = plain_options(options, taken)
    variants: list[tuple[str, dict[str, Any]]] = []
    for text in algos:
        name, brace, own = text.partition("{")
        if not name.strip():
            raise ValueError(f'--algos: {text} belongs to no algorithm; name and options are one argument: "CPQL {text}".')
        algo = _check_algorithm(name.strip(), suite)
        # other libraries have other options
        common = {} if ":" in algo else given
        mine = merged(common, plain_options(brace + own, taken, "--algos") if brace else {})
        steps = [{STEPS_OPTION[algo]: n} for n in DENOISING_STEPS] if suite == "denoising" else [{}]
        variants += [(algo, {**mine, **each}) for each in steps]
    return [
        Job(suite, algo, repr(variant), place, seed, offline_steps, online_steps, episodes, evaluations)
        for seed in seeds
        for place in data
        for algo, variant in variants
    ]


def _check_algorithm(name: str, suite: str) -> str:
    """The algorithm's class name, if the suite can run it: better now than after hours of other runs."""
    cls = find_algorithm(name)
    if name.startswith("d3rlpy:"):
        if suite != "offline":
            raise ValueError(f"--algos: {name!r} runs in the offline suite only.")
        return class_name(name)
    if suite != "online" and not hasattr(cls, "from_dataset"):
        raise ValueError(f"--algos: {name!r} does not learn from datasets, which the {suite} suite is about.")
    if not issubclass(cls, OffPolicyAlgorithm):
        raise ValueError(f"--algos: {name!r} takes whole rollouts, not --online-steps; use off-policy algorithms, like SAC.")
    if suite in ("online", "offline-to-online") and getattr(cls, "offline_only", False):
        raise ValueError(f"--algos: {name!r} learns offline only; the {suite} suite collects experience.")
    if suite == "denoising" and cls.__name__ not in STEPS_OPTION:
        raise ValueError(f"--algos: the denoising suite knows the steps of {sorted(STEPS_OPTION)}, not of {name!r}.")
    return class_name(name)
