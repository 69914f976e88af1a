"""One module for each image format that is served.

Each has `reduced(data, max_pixels)`: the pieces of a file that decodes to the same image, or None where that is the
file itself. It is called before a decoder sees the bytes, and raises PictureProblem for a structure that would cost
more than its pixels are worth, and IndexError, ValueError or struct.error for one that is damaged or cut short.
"""
