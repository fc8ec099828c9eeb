"""Generated from proto/sdar/v1 by `make proto`; never edited. Only the codec, servers and clients import it."""
