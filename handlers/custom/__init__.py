"""The user's own handler: `model.py` with `handle(inputs)`, in the style of DJL Serving, in processes of its own."""
