"""How a model leaves the house: zips, safe files, exported policies."""
