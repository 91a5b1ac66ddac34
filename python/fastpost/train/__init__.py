# SPDX-License-Identifier: Apache-2.0
"""The driver: configuration, loop, optimizer, checkpoints, metrics.

Import submodules by name. This file stays empty so that the configuration can be read without torch.
"""
