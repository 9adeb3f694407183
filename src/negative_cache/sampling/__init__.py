"""Draws cached rows, chooses the drawn rows to re-encode, and computes their weights in the loss.

Imports `cache/`, `retrieval/` and `estimators`. Nothing here sends messages to other processes.
"""
