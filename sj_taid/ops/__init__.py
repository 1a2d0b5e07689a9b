"""The operations behind the modules: one folder an operation, the definition beside the fast paths."""
