"""The network: pure functions over a parameter tree, with rows as an input."""
