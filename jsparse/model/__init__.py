"""What a model is: its configuration, weights and caches, and the decoder that executors compute."""
