"""The embedded engine: token ids and prepared images in, token ids and log probabilities out."""
