"""What of a request's headers goes on to the predictor: ids, trace and authorization.

Nothing else does: cookies and the like are between the client and this server. As
headers over REST and as metadata over gRPC they are the same.
"""

from __future__ import annotations

import re

from kserve_lite.messages import Context

# As they came: B3's ids (https://github.com/openzipkin/b3-propagation), which Istio's
# proxies and KServe's SDK go by, and who the caller is.
_AS_THEY_ARE = (
    "authorization",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
)
# What both a header and metadata can hold.
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


def forwarded(context: Context) -> dict[str, str]:
    """The headers to send along with a request."""
    headers = {
        "x-request-id": context.request_id,
        "traceparent": context.traceparent,
    }
    came = context.headers
    # W3C Trace Context 3.3.1.3: the state belongs to its trace, and a trace that was
    # begun anew here has none.
    names: tuple[str, ...] = _AS_THEY_ARE
    if came.get("traceparent", "")[3:35] == headers["traceparent"][3:35]:
        names = (*names, "tracestate")
    for name in names:
        value = came.get(name)
        if isinstance(value, str) and _VALUE.fullmatch(value):
            headers[name] = value
    return headers
