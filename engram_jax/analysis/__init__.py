"""What came out of runs: fits, tables and figures."""
