"""gRPC and HTTP, at both ends, and who may come in."""
