"""The loss of a batch: its validated inputs, its scores, the loss value, and the diagnostics of a run.

Imports `distributed/`, `sampling/`, `estimators` and the layers below them.
"""
