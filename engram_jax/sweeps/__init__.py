"""Many runs: swept here or on a cluster, forecast, compared, run again."""
