"""Benchmarks: `python -m benchmarks step | peers | scale | memory | end-to-end | variance`, see `__main__.py`."""
