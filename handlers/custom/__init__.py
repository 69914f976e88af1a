"""The user's own handler: `model.py` with `handle(inputs)`, in DJL Serving's style. It runs in its own processes."""
