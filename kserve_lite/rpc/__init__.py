"""The gRPC API: calls on streams of our HTTP/2 engine, run by grpclib.

Imports grpclib and protobuf, which no server needs that is asked for REST only: import
it where gRPC is started.
"""
