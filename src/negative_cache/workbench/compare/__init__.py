"""Comparisons of losses: one configuration, a sweep of the learning rate for each loss, tables and plots.

Imports `negative_cache.workbench` `training`, `data`, `models`, `figures` and `files`.
"""
