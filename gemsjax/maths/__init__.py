"""Equations, one function each, without networks or environments."""
