"""Defaults, choices and names that the command line needs before the libraries are imported."""

DEFAULT_MEASURES = "MRR@10 nDCG@10 AP@100 R@1 R@10 R@100"
ALPHA = 0.05  # significance level
DTYPES = ("float32", "bfloat16", "float16")
BATCH_SIZE, STATIC_BATCH_SIZE = 32, 256  # texts that a model, or a static one, encodes at once

COMPARISON = "compare.json"
"""The file of a comparison: "losses" -> name of a loss -> "runs" -> "folder", its name in the folder "runs"."""
