"""Shared code in three wings, along the way the data takes.

``slices`` reads and writes what lies on disk, ``training`` turns it into batches and runs the loops, ``evaluation``
turns predictions into numbers and figures. ``training`` may use ``slices``; the other two use neither wing.
"""
