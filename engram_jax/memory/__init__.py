"""Where tables live, how rows are read and how they are updated."""
