"""SB3 modules around the pure networks."""
