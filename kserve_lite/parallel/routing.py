"""Which replica gets a request: the one that has the fewest of them.

Ray Serve's own router looks at two replicas, asks each how much it has, and may send
two requests that come at once to the same one while the other has nothing to do. The
server is the only one that asks its replicas, so it knows by itself.

This module imports Ray, and so is itself imported where it is used: by Ray, by name.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
)

# A replica as Ray's router knows it, in `ray.serve._private`.
RunningReplica = Any


class LeastBusy(FIFOMixin, RequestRouter):
    """Goes by the requests that were sent to each replica and have not ended."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._sent: dict[ReplicaID, int] = {}
        self._turns = count(1)
        # When each was chosen last: of equals the one that waited longest is next, so
        # also while what was sent is not counted yet.
        self._turn: dict[ReplicaID, int] = {}
        # Which could not be reached and are asked before they get anything.
        self._doubtful: set[ReplicaID] = set()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        sent, turn, doubtful = self._sent, self._turn, self._doubtful

        def rank(replica: RunningReplica) -> tuple[bool, int, int]:
            key = replica.replica_id
            return key in doubtful, sent.get(key, 0), turn.get(key, 0)

        ranked = sorted(candidate_replicas, key=rank)
        for replica in ranked:
            # Else Ray asks a replica of which it has heard nothing for 10 s.
            if replica.replica_id not in doubtful:
                busy = sent.get(replica.replica_id, 0)
                self.replica_queue_len_cache.update(replica.replica_id, busy)
        if ranked:
            turn[ranked[0].replica_id] = next(self._turns)
        return [[replica] for replica in ranked]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._sent[replica_id] = self._sent.get(replica_id, 0) + 1

    def on_request_completed(
        self, replica_id: ReplicaID, internal_request_id: str
    ) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        if self._sent.get(replica_id, 0) > 0:
            self._sent[replica_id] -= 1

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._doubtful.add(replica_id)

    def on_new_queue_len_info(
        self, replica_id: ReplicaID, num_ongoing_requests: int
    ) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._doubtful.discard(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        self._doubtful &= there
        for known in (self._sent, self._turn):
            for gone in known.keys() - there:
                del known[gone]
