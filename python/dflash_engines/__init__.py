"""Plugins that engines load through their own entry points. Importing this package imports no engine."""
