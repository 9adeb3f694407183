"""The fused pass: Triton kernels that score, sum and draw without writing scores to memory.

Imports torch and `retrieval/`; Triton is imported on first use.
"""
