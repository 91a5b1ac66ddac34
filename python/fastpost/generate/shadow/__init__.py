# SPDX-License-Identifier: Apache-2.0
"""The cache of low-rank keys: `cache` is what transformers sees, `layer` attends, `rows` is what all layers share,
`store` and `values` hold compressed prompts, `rope` turns keys back."""

from fastpost.generate.shadow.cache import ShadowCache

__all__ = ["ShadowCache"]
