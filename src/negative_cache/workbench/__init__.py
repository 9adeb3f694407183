"""The command line and its parts: data, models, training, comparisons and reports.

The folder may import everything else in this package; in this package, only `__main__` imports it.
"""
