"""Datasets in several files: folders of BEIR and MS MARCO, files for each split, and the Hugging Face hub."""
