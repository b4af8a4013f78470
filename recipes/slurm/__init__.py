"""Recipes as Slurm jobs: what is printed, and how it is submitted."""
