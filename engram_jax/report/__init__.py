"""`engram-jax report`: runs and what happens inside them as one page of HTML."""
