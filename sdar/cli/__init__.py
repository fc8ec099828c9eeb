"""The `sdar` command. The only part of `sdar` that may import services."""
