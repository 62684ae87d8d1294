"""Planners that are trained in stages: their plans, networks and data."""
