"""Rows of a query with its documents, in the forms that other projects write."""
