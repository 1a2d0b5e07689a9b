"""The operations behind the modules: a folder each, the definition beside the fast paths."""
