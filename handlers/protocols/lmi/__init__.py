"""LMI's own API, with its adapters and sessions."""
