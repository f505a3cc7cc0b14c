"""KServe's `protocol.grpc` package."""
