"""Integrations of the negative cache with sentence-transformers, transformers and Lightning.

Each module may import `negative_cache` without `workbench`, and the package that it integrates.
"""
