"""Tables on a mesh: their layout, the exact exchange of rows, and optimizers of the rows read."""
