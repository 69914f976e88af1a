"""Paged attention: the kernels, and how transformers' modelling code reaches them."""
