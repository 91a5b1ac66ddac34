# SPDX-License-Identifier: Apache-2.0
"""Text out of a causal LM: an engine that answers many requests at once, a server in its place, rows in and out."""

from fastpost import lazy

_HOME = {  # public name -> module that defines it
    "generate": "fastpost.generate.sample",
    "Engine": "fastpost.generate.engine",
    "Request": "fastpost.generate.request",
    "Sampling": "fastpost.generate.request",
    "Completion": "fastpost.generate.request",
    "Piece": "fastpost.generate.request",
    "Endpoint": "fastpost.generate.endpoint",
    "EndpointError": "fastpost.generate.endpoint",
    "OneByOne": "fastpost.generate.one_by_one",
}

__all__ = list(_HOME)

__getattr__, __dir__ = lazy.names(__name__, _HOME)
