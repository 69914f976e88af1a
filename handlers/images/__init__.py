"""A request's pictures: fetched from hostile places or decoded from data URLs, and kept by content."""
