"""Planners: windows of trajectories, plans and their memory."""
