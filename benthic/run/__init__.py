"""A whole run: every stage from raw text to a model that is measured, exported and reported on."""
