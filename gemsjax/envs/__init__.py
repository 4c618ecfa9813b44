"""Environments: pure functions over one user; `registry.make` builds them."""
