"""
What a type checker sees of the options: ``make type`` checks this file, nothing runs it.

An error that is expected is ignored by its code; where none comes up, the unused ignore is an error itself.
"""

from typing import Any

from sb3_consistency import CPQL, RACTD, ConsistencyBC, DiffusionQL

model = CPQL("MlpPolicy", "Pendulum-v1", 3e-4, eta=lambda step: 1.0, sampling_steps=1, policy_kwargs=dict(net_arch=[64, 64]))
n: int = model.n_eval_candidates
model.learn(100).save("model")
m: int = CPQL.load("model").n_eval_candidates + CPQL.load_safe("model").learn(1).n_eval_candidates
CPQL.from_dataset("mujoco/hopper/medium-v0", pretrain_steps=1000).pretrain(10)

DiffusionQL("MlpPolicy", "Pendulum-v1", diffusion_steps=5, sampler="ddim", n_candidates=50, buffer_size=1000)
RACTD("MlpPolicy", dataset="mujoco/hopper/medium-v0", horizon=8, sampling_steps=1, teacher_steps=0.4)
ConsistencyBC("MlpPolicy", dataset="mujoco/hopper/medium-v0", bc_loss="ict", max_grad_norm=None)


class Mine(CPQL):
    learning_starts = 1000
    n_candidates: int = 10

    def __init__(self, policy: str, env: str, own: int = 1, **kwargs: Any) -> None:
        self.own = own
        super().__init__(policy, env, **kwargs)


own: int = Mine.load("model").learn(1).own + Mine("MlpPolicy", "Pendulum-v1", own=2, n_candidates=5).own
other: int = CPQL.load("model").own  # type: ignore[attr-defined]

CPQL("MlpPolicy", "Pendulum-v1", n_candidate=50)  # type: ignore[call-arg]
CPQL("MlpPolicy", "Pendulum-v1", n_candidates="fifty")  # type: ignore[arg-type]
CPQL("MlpPolicy", "Pendulum-v1", 3e-4, 1000)  # type: ignore[call-arg]
ConsistencyBC("MlpPolicy", dataset="d", value_mode="iql")  # type: ignore[call-arg]
