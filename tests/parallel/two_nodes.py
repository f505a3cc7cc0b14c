"""A Ray cluster of two nodes, with an application on it that is nobody's here.

Writes its address and the second node's id as a line of JSON, then answers each line
that it reads: with what runs on it.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Other:
    def __call__(self) -> str:
        return "still here"


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=4, num_gpus=1, resources={"x": 1})
    ray.init(cluster.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    handle = serve.run(Other.bind(), name="other", route_prefix=None)  # type: ignore
    say(address=cluster.address, node=node.node_id, remote=f"ray://127.0.0.1:{port}")
    for _ in sys.stdin:
        say(
            apps=sorted(serve.status().applications),
            other=handle.remote().result(),
            alive=sum(node["Alive"] for node in ray.nodes()),  # type: ignore
            free=ray.available_resources().get("x", 0),  # type: ignore
            gpus=ray.available_resources().get("GPU", 0),  # type: ignore
        )
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
