"""Value functions: losses and networks, torch only."""
