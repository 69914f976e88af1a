"""One module for each supported image format.

Each has `size(data)`, which returns a `Size`, and `reduced(data, max_pixels)`: the pieces of a file that
decodes to the same image, or None if that is the file itself. They are called before a decoder sees the
bytes. Both raise IndexError, ValueError or struct.error for a file that is damaged or cut short, and
`reduced` raises ImageProblem for a structure that would cost more than its pixels are worth.
"""
