# SPDX-License-Identifier: Apache-2.0
"""transformers through its official doors only: folders in and out, packed attention, backbone and head."""
