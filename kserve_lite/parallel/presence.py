"""Whether the server that deployed replicas on another's cluster still is.

A server that is killed cannot remove them, and they would keep their processors and
GPUs for ever. So it has an actor there, which Ray ends with whoever made it, and each
replica waits for that. On a cluster of the server's own Ray ends them all anyway.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NamedTuple

from kserve_lite.records import new_id

log = logging.getLogger("kserve_lite")

# Of the actors' names.
NAMESPACE = "kserve_lite"
# Seconds between two tries to reach an actor that Ray is moving to another node.
AGAIN = 1.0


class Presence:
    """The actor. It does nothing but be there."""

    async def until_gone(self) -> None:
        await asyncio.Event().wait()


def appear() -> tuple[str, Any]:
    """Make the actor, which ends with this process, not with the node that it is on.

    Return its name, too: handles that Ray's client, ray://, makes mean nothing to a
    replica.
    """
    import ray

    name = new_id()
    kind: Any = ray.remote(Presence)
    made = kind.options(
        name=name,
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    return name, made.remote()


class Bond(NamedTuple):
    """What binds an application of Ray Serve to its server.

    presence: the name of the server's actor. app: the application's.
    """

    presence: str
    app: str

    async def hold(self) -> None:
        """Wait until the server has gone, then remove the application."""
        import ray
        from ray import serve
        from ray.exceptions import ActorDiedError, RayError

        while True:
            try:
                actor: Any = await asyncio.to_thread(
                    ray.get_actor, self.presence, NAMESPACE
                )
                await actor.until_gone.remote()
            except (ValueError, ActorDiedError):  # there is no such actor any more
                break
            except RayError:
                await asyncio.sleep(AGAIN)
        log.warning("the server of %s has gone: removing it", self.app)
        # Every replica does; it does not wait, since this one is to end, too.
        await asyncio.to_thread(serve.delete, self.app, _blocking=False)
