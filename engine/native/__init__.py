"""What the engine computes on a CPU in compiled code, loaded by `engine.native.library`."""
