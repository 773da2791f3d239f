"""Adapters that engines load through their own plugin entry points; importing this imports no engine."""
