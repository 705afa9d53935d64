"""What a run costs, counted and compiled: parameters, FLOPs, memory, collectives."""
