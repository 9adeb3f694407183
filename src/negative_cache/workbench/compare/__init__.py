"""Comparisons of losses: one configuration, a sweep of the learning rate for each loss, tables and plots.

Imports `negative_cache.workbench` `training`, `evaluation`, `data`, `models`, `figures` and `files`.
"""
