"""Scores that a paper prints, to stand beside ours. They are theirs: other data, budgets and evaluation."""

#: what a table says of them
SOURCE = (
    "Ding & Jin 2024, table 1: D4RL v2 data of the same task and level, 5 seeds, diffusion with 5 steps, consistency with 2"
)
# as reprinted by a later paper
_TASKS = ("halfcheetah", "hopper", "walker2d")
_LEVELS = ("medium", "medium-replay", "medium-expert")
_SCORES = {
    "DiffusionBC": (45.4, 65.3, 81.2, 41.7, 67.3, 77.5, 90.8, 107.6, 108.9),
    "ConsistencyBC": (31.0, 71.7, 83.1, 34.4, 99.7, 73.3, 32.7, 90.6, 110.4),
    "DiffusionQL": (51.1, 90.5, 87.0, 47.8, 101.3, 95.5, 96.8, 111.1, 110.1),
    "ConsistencyAC": (69.1, 80.7, 83.1, 58.7, 99.7, 79.5, 84.3, 100.4, 110.4),
}
PUBLISHED = {
    algo: dict(zip([f"{task}-{level}-v2" for level in _LEVELS for task in _TASKS], scores, strict=True))
    for algo, scores in _SCORES.items()
}


def published_score(algo: str, dataset: str) -> float | None:
    """
    :param algo: name of the algorithm's class
    :param dataset: Minari id; "mujoco/hopper/medium-v0" is Minari's own recording of what D4RL calls hopper-medium
    :return: the score printed for D4RL's set of that task and level, or None
    """
    namespace, _, name = dataset.partition("/")
    task, _, level = name.rpartition("-v")[0].partition("/")
    return PUBLISHED.get(algo, {}).get(f"{task}-{level}-v2") if namespace == "mujoco" else None
