"""Benchmarks: cases, candidates (ours and peers), the measurement, and what is made of the results.

Used by ``convnext-kernels bench``, ``compare`` and ``verify`` and by ``pytest benchmarks --benchmark-only``.
"""
