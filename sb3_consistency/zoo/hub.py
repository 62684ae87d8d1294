"""The model card that ``push-to-hub`` writes: our names, and usage lines that work."""

from pprint import pformat
from typing import Any

from sb3_consistency.zoo.register import algorithm_names, canonical

CARD = """
# **{class_name}** agent for **{env_id}**
A **{class_name}** agent trained for **{env_id}** with [sb3_consistency](https://pypi.org/project/sb3-consistency/)
(one-step generative policies for [Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3)) and the
[RL Zoo](https://github.com/DLR-RM/rl-baselines3-zoo). Mean return {mean_reward:.2f} +/- {std_reward:.2f}.

## Usage
```bash
pip install "sb3-consistency[zoo]"  # or in a checkout: pip install -e ".[zoo]"
# the model is a pickle: fetch it only from whom you trust
export TRUST_REMOTE_CODE=True
python -m sb3_consistency load-from-hub --algo {algo} --env {env_id} -orga {organization}{repo_name} -f logs/
python -m sb3_consistency enjoy --algo {algo} --env {env_id} -f logs/
```

## Training
```bash
python -m sb3_consistency train --algo {algo} {data} -f logs/
python -m sb3_consistency push-to-hub --algo {algo} --env {env_id} -f logs/ -orga {organization}{repo_name}
```

## Hyperparameters
```python
{hyperparams}
```
"""
ENV_KWARGS = """
## Environment arguments
```python
{env_kwargs}
```
"""


def use_our_card(module: Any) -> None:
    """
    Have models of this package described by our card; those of others keep rl-zoo3's.

    :param module: the module ``rl_zoo3.push_to_hub``
    """
    original = getattr(module.generate_model_card, "original", module.generate_model_card)

    def generate_model_card(
        algo_name: str,
        algo_class_name: str,
        organization: str,
        env_id: str,
        mean_reward: float,
        std_reward: float,
        hyperparams: dict[str, Any],
        env_kwargs: dict[str, Any],
    ) -> tuple[str, dict[str, Any]]:
        if canonical(algo_name) not in algorithm_names():
            card: tuple[str, dict[str, Any]] = original(
                algo_name, algo_class_name, organization, env_id, mean_reward, std_reward, hyperparams, env_kwargs
            )
            return card
        # rl-zoo3 finds a model again by the key that it derives from the name in the metadata
        metadata = module.generate_metadata(algo_name, env_id, mean_reward, std_reward)
        metadata["tags"] = [*metadata.get("tags", []), "sb3-consistency", algo_class_name]
        # the script's own variables: rl-zoo3 does not hand these on
        repo_id = str(vars(module).get("repo_id", ""))
        name = repo_id.removeprefix(f"{organization}/")
        custom = name not in ("", str(vars(module).get("model_name", name)))
        text = CARD.format(
            algo=algo_name,
            class_name=algo_class_name,
            env_id=env_id,
            organization=organization,
            repo_name=f" -name {name}" if custom else "",
            data=_training_options(env_id, hyperparams),
            mean_reward=mean_reward,
            std_reward=std_reward,
            hyperparams=pformat(dict(hyperparams)),
        )
        return text + (ENV_KWARGS.format(env_kwargs=pformat(env_kwargs)) if env_kwargs else ""), metadata

    generate_model_card.original = original  # type: ignore[attr-defined]
    module.generate_model_card = generate_model_card


def _training_options(env_id: str, hyperparams: dict[str, Any]) -> str:
    dataset = hyperparams.get("dataset")
    if not dataset:
        return f"--env {env_id}"
    names = ",".join(dataset) if isinstance(dataset, (list, tuple)) else str(dataset)
    steps = hyperparams.get("pretrain_steps")
    return f"--dataset {names}" + (f" --pretrain-steps {int(steps)}" if steps else "")
