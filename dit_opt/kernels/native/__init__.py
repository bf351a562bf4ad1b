"""C++ kernels of the processor paths, built on first use by the compiler that Inductor needs, too.

A library product per piece of work, as the paths without them have it, waits for all threads each
time and passes every intermediate result through memory. Here a thread takes a piece from beginning
to end.
"""
