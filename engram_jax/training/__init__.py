"""One training step: state, optimizers, and where everything lies; nothing here touches a disk."""
