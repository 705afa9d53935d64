"""What came out of runs, in numbers and figures, and what happens inside trained models."""
