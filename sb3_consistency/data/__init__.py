"""From files and arrays to the rows of a replay buffer."""
