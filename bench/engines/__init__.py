"""Engines with our plugin and without it."""
