"""Run callables on Ray and yield each result as it ends.

This package alone imports ray, and only once a cluster is used.
"""
