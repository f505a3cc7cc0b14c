"""What a server that is asked for REST only never pays for."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
import kserve_lite, kserve_lite.rest.endpoints, kserve_lite.transports.listener
late = ("grpclib", "google.protobuf", "h2", "numpy", "kserve_lite.rpc")
print([name for name in late if name in sys.modules])
import kserve_lite.rpc.app
print("numpy" in sys.modules)
"""


def test_grpc_is_imported_where_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["[]", "False"]
