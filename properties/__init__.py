"""What the user configured: reads the sources, remembers where each value came from, and resolves them."""
