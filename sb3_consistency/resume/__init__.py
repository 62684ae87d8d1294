"""A killed run goes on: checkpoints of a whole run."""
