"""Kinds of errors and statuses; arrays in the other byte order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kserve_lite import InferRequest, InferResponse, InvalidInput, Tensor
from kserve_lite.codecs import v2
from kserve_lite.errors import Kind
from kserve_lite.rest.replies import STATUS, fault_reply


def test_every_kind_has_a_status() -> None:
    assert set(STATUS) == set(Kind)


def test_a_fault_with_lone_surrogates_is_still_json() -> None:
    reply = fault_reply(InvalidInput("a\udc80b"))
    assert isinstance(reply.body, bytes)
    assert json.loads(reply.body) == {"error": "a?b"}


def test_other_byte_orders_are_converted() -> None:
    swapped = np.array([1, 2], ">i4")
    response = InferResponse((Tensor.from_array("o", swapped),), "i", "m")
    (body,), _ = v2.encode(response)
    assert json.loads(bytes(body))["outputs"][0]["data"] == [1, 2]


def test_a_missing_input_names_itself() -> None:
    with pytest.raises(InvalidInput, match=r"^Input 'pixels' is missing\.$"):
        InferRequest("m", ())["pixels"]
