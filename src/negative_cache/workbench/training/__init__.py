"""Training runs: their configuration, losses, trainer, driver and record.

Imports `negative_cache.workbench` `data`, `evaluation`, `models` and `files`, and the library.
"""
