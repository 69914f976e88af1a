"""The APIs: what they share, and one folder for each."""
