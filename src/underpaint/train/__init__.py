"""The training loop and its parts: one loop for everything that is trained."""
