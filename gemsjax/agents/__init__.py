"""Agents: each file makes one family of `base.Agent` or `base.Policy`. They never import environments."""
