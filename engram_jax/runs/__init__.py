"""A run on a disk or in object storage: trained, evaluated, checkpointed, exported."""
