# SPDX-License-Identifier: Apache-2.0
"""fastpost: fused losses and kernels for post-training LLMs. Names load on first use; torch is imported by them."""
__version__ = "0.1.0"
