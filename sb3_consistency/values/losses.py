"""
Losses and targets of value functions, as pure functions of tensors.

Q-values are (B, C): one column per critic.
"""

import torch as th


def td_target(rewards: th.Tensor, dones: th.Tensor, discounts: th.Tensor | float, next_values: th.Tensor) -> th.Tensor:
    """
    Temporal-difference target r + gamma (1 - done) V(s').

    :param rewards: (B, 1)
    :param dones: 1 where the episode terminated; time-outs are 0, so they bootstrap, (B, 1)
    :param discounts: gamma, or gamma^n per row for n-step returns, scalar or (B, 1)
    :param next_values: value of the next state, (B, 1), or K quantiles of the return from there, (B, K)
    :return: target, (B, 1) or (B, K)
    :raises ValueError: if the shapes would broadcast to anything else
    """
    if next_values.ndim != 2 or not rewards.shape == dones.shape == (len(next_values), 1):
        raise ValueError(
            "rewards and dones must have the shape (B, 1), next_values (B, 1) or (B, K), got "
            f"{tuple(rewards.shape)}, {tuple(dones.shape)} and {tuple(next_values.shape)}."
        )
    return rewards + discounts * (1 - dones) * next_values


def pessimistic_value(q_values: th.Tensor, pair: th.Tensor | None = None) -> th.Tensor:
    """
    Minimum over the critics (clipped double Q-learning), or over a random pair of them.

    Source: Fujimoto et al. 2018 (TD3); Chen et al. 2021 (REDQ) for the random pair out of an ensemble.

    :param q_values: (B, C)
    :param pair: indices of the critics to use, (2,); all of them when None
    :return: (B, 1)
    """
    chosen = q_values if pair is None else q_values.index_select(1, pair)
    return chosen.amin(dim=1, keepdim=True)


def lowest_quantiles(quantiles: th.Tensor, dropped: int) -> th.Tensor:
    """
    The quantiles of all critics together, without the highest: the mean of those that are left is a pessimistic value.

    Source: Kuznetsov et al. 2020 (TQC), section 3.

    :param quantiles: (B, C, N)
    :param dropped: how many per critic are left out
    :return: in rising order, (B, C (N - dropped))
    """
    n_critics, n_quantiles = quantiles.shape[1:]
    return quantiles.flatten(1).sort(dim=1).values[:, : n_critics * (n_quantiles - dropped)]


def twin_q_loss(q_values: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    Mean squared error of every critic against one target, summed over the critics.

    :param q_values: (B, C)
    :param target: (B, 1), no gradient flows into it
    :return: scalar
    """
    return (q_values - target.detach()).square().mean(dim=0).sum()


def expectile_loss(difference: th.Tensor, expectile: float) -> th.Tensor:
    """
    Asymmetric squared error |expectile - 1(difference < 0)| difference^2.

    Source: Kostrikov et al. 2021 (IQL), equation 5, with difference = Q(s, a) - V(s).

    :param difference: any shape
    :param expectile: in (0, 1); 0.5 is half the mean squared error
    :return: scalar
    """
    weight = th.where(difference < 0, 1 - expectile, expectile)
    return (weight * difference.square()).mean()


def normalised_q_loss(q_values: th.Tensor, scale_values: th.Tensor) -> th.Tensor:
    """
    Policy-improvement term -E[Q_i] / stopgrad E|Q_j|.

    Source: Wang et al. 2022 (Diffusion-QL), section 4.

    :param q_values: values to raise, any shape
    :param scale_values: values that set the scale, any shape
    :return: scalar
    """
    return -q_values.mean() / scale_values.detach().abs().mean().clamp(min=1e-6)


def temperature_gradient(entropy: th.Tensor, target: float) -> th.Tensor:
    """
    Gradient of log(temperature) (entropy - target) by log(temperature): an entropy below its target raises the temperature.

    It is 0 where the entropy is not finite.

    Source: Haarnoja et al. 2018 (SAC), equation 18.

    :param entropy: of the policy, mean over a batch, scalar
    :param target: what it should be
    :return: scalar
    """
    return th.where(entropy.isfinite(), entropy - target, 0.0)


def batch_normalised(target: th.Tensor) -> th.Tensor:
    """
    Target divided by its standard deviation over the batch (the ``q_norm`` option of Ding & Jin's code).

    It changes the fixed point of the critic. Targets that are all equal stay as they are.

    :param target: (B, 1)
    :return: (B, 1)
    """
    std = target.std(unbiased=False)
    return target / th.where(std > 1e-6, std, 1.0)


def choose_candidate(
    q_values: th.Tensor, actions: th.Tensor, gumbel: th.Tensor | None = None, temperature: float = 1.0
) -> th.Tensor:
    """
    Pick one of K candidate actions per state by its value: the best, or one drawn with probability softmax(Q / T).

    Source: Wang et al. 2022 (Diffusion-QL), section 4 (softmax without temperature).

    :param q_values: (B, K)
    :param actions: (B, K, A)
    :param gumbel: standard Gumbel noise for the softmax draw, (B, K); None for the best candidate
    :param temperature: T of the softmax
    :return: (B, A)
    """
    scores = q_values if gumbel is None else q_values / temperature + gumbel
    index = scores.argmax(dim=1)
    return actions[th.arange(actions.shape[0], device=actions.device), index]


def gumbel_noise(u: th.Tensor) -> th.Tensor:
    """
    Standard Gumbel noise by inversion: argmax(logits + noise) draws from softmax(logits).

    :param u: uniform numbers in [0, 1), any shape
    :return: the shape of ``u``
    """
    exponential = (-th.log(u.clamp(min=1e-20))).clamp(min=1e-20)
    return -th.log(exponential)
