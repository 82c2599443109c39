"""Evaluation: protocols, deterministic generation, measures with their errors, reports."""
