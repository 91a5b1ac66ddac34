# SPDX-License-Identifier: Apache-2.0
"""Rows in, packed batches out: columns, chat template and mask, order, collation. Import submodules by name."""
