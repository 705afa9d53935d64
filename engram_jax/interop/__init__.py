"""Other people's weights, in and out: safetensors shards of released models, and of our runs."""
