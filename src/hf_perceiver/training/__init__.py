"""Training recipes that run: data, masks, baselines, and a script for each checkpoint that ships with the package."""
