"""Benchmarks: `python -m benchmarks COMMAND`; `__main__.py` lists the commands."""
