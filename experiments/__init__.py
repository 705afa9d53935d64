"""One folder a question; each has a README, its configs and its results."""
