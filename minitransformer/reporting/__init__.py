"""Figures, tables and pages, and the statistics in them."""
