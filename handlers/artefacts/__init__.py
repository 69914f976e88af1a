"""Getting the model onto this machine."""
