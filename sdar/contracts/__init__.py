"""The vocabulary of the system: types, their codec, stream names and errors. No I/O."""
