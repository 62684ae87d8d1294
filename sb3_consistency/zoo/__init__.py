"""
rl-zoo3 with the algorithms of this package: its commands, hyperparameter files, tuning and sharing.

Importing this package does not import rl-zoo3 (which changes Gymnasium); :func:`register` and the commands do.
"""

from sb3_consistency.zoo.register import register

__all__ = ["register"]
