"""What trained runs can do: long-context tasks, perplexity on key tokens, benchmarks."""
