"""Measurements: each module is a script that prints machine, versions and medians."""
