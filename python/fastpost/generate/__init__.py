# SPDX-License-Identifier: Apache-2.0
"""Text out of a causal LM: an engine for many requests, a server in its place, and the shortest way to some answers."""

from fastpost import lazy

_HOME = {  # public name -> module that defines it
    "generate": "fastpost.generate.sample",
    "Completion": "fastpost.generate.request",
    "Endpoint": "fastpost.generate.endpoint",
    "EndpointError": "fastpost.generate.endpoint",
    "Engine": "fastpost.generate.engine",
    "Handle": "fastpost.generate.handle",
    "OneByOne": "fastpost.generate.one_by_one",
    "Piece": "fastpost.generate.request",
    "Request": "fastpost.generate.request",
    "Sampling": "fastpost.generate.request",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy.names(__name__, _HOME)
