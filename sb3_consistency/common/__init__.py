"""The Stable-Baselines3 side, written once for all algorithms: policy, training loop, saving and loading."""
