"""Quality against memory: every cache on the same text, by the same code."""
