# SPDX-License-Identifier: Apache-2.0
"""Text out of a causal LM: greedy or sampled, through transformers' generate."""

from fastpost.generate.sample import generate

__all__ = ["generate"]
