"""Offline data: where it comes from, how it gets into SB3's replay buffer, and pretraining on it."""
