"""Benchmarks: `python -m benchmarks step | peers | scale | memory | end-to-end`, see `__main__.py`."""
