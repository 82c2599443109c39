"""Recipes, one YAML each: `configs/fashion/dmd2.yaml` has the short name `fashion/dmd2`."""
