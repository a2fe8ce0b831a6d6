"""Figures, tables, pages and statistics for reports."""
