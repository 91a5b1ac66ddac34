# SPDX-License-Identifier: Apache-2.0
"""One file per op. Each defines cases(options) -> the workloads; see bench/case.py."""
