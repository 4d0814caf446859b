"""Faults and abuse, played on a real server: see docs/reliability.md for the table."""
