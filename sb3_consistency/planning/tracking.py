"""The controller that tracks a plan of states: which state is planned for a step, and the force towards it."""

import numpy as np


def planned_states(plans: np.ndarray, steps: np.ndarray, stride: int) -> np.ndarray:
    """
    Between two planned states, the point of the line that joins them; after the last, its position at rest.

    :param plans: positions and velocities, (N, H, 2 n)
    :param steps: environment steps since the first state of each plan, (N,)
    :param stride: environment steps from one planned state to the next
    :return: states, (N, 2 n)
    """
    rows, last = np.arange(len(plans)), plans.shape[1] - 1
    before, part = np.divmod(steps, stride)
    earlier, later = (plans[rows, np.minimum(i, last)] for i in (before, before + 1))
    states: np.ndarray = earlier + (part / stride)[:, None].astype(plans.dtype) * (later - earlier)
    states[steps > last * stride, states.shape[1] // 2 :] = 0
    return states


def forces(states: np.ndarray, targets: np.ndarray, gains: tuple[float, float]) -> np.ndarray:
    """
    k_p (p* - p) + k_v (v* - v), not clipped.

    :param states: positions p and velocities v, (N, 2 n)
    :param targets: those to reach, p* and v*, (N, 2 n)
    :param gains: k_p and k_v
    :return: forces, (N, n)
    """
    position, velocity = np.split(targets - states, 2, axis=1)
    return gains[0] * position + gains[1] * velocity
