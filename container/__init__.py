"""The HTTP server: from its command line and its socket to the handlers, and back."""
