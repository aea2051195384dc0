"""Accelerate models of other libraries in place."""
