"""The algorithms: one file each, little more than its losses."""
