"""Comparisons, side by side in one run; each prints a table and can write JSON records."""
