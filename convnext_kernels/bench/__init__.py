"""Benchmarks: cases, candidates, measurement, tables and reports.

Used by ``convnext-kernels bench``, ``compare`` and ``verify`` and by ``pytest benchmarks --benchmark-only``.
"""
