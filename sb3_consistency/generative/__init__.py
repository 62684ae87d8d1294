"""
Generative models of actions, in pure PyTorch.

Nothing here knows of reinforcement learning, environments or optimizers, and nothing draws random numbers except
dropout: noise comes in as an argument, so every function is a function.
"""
