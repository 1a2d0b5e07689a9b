"""ALIF. ``reference.py`` is the definition; every other file is a faster way to the same numbers."""
