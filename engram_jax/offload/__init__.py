"""Tables off the device: in host memory, on a disk, behind caches; rows are sent ahead of need."""
