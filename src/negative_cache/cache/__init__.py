"""Storage of the cache: feature specs, rows, updates and lookups.

A training step uses these modules to validate its documents, to read drawn rows and to write rows.
The folder imports only torch and its own modules.
"""
