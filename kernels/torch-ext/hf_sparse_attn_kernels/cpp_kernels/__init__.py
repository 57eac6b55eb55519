"""The CPU implementation: C++ over vectors, compiled at first use; see `compiling`."""
