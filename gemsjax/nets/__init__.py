"""Networks: the only folder that imports Flax's module system. Everything else calls `init` and `apply`."""
