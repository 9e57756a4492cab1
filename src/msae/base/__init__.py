"""Errors, files, settings, progress, statistics: what every other wing may use."""
