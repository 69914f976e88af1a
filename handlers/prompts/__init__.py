"""From a request to the prompt that a model reads, and from its tokens to text."""
