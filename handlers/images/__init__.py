"""Images of requests: fetched from hosts that may be hostile or decoded from data URLs, and cached by content."""
