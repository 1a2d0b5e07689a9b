"""What several parts of the package share, and nobody imports from outside."""
