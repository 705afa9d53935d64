"""What the parts cost, each measured beside its plain counterpart."""
