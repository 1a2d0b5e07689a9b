"""ALIF: ``reference.py`` is the definition, every other file a faster way to the same numbers."""
