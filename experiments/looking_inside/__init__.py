"""Why does it work? LogitLens and CKA of Engram against experts alone."""
