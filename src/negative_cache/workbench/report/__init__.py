"""The report: one HTML page of a run, or of several side by side, with charts.

Imports `negative_cache.workbench` `compare`, `training`, `figures` and `files`.
"""
