# SPDX-License-Identifier: Apache-2.0
"""What each op means, in plain torch, and the cases that its tests and benchmarks share."""
